# What a clone needs. Everything runs in a virtual environment of its own; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo ablation-demo test test-slow lint format notebooks gpu-check lock rename clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## the virtual environment with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reslab needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,notebooks]'
	@touch $@

demo: $(STAMP)  ## train and test a ResNet on handwritten digits, one minute on a laptop
	@$(BIN)/reslab fit --config configs/experiment/digits.yaml

ablation-demo: $(STAMP)  ## three arms, five seeds and a verdict on handwritten digits, two minutes on two cores
	@$(BIN)/reslab ablate run configs/ablation/digits_shortcuts.yaml --jobs 2

# One thread a test process: two processes of two threads each on two cores get in each other's way.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(STAMP)  ## the tests
	@$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)  ## the tests that take longer
	@$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## lay out the code, sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(STAMP)  ## run the notebooks from top to bottom
	@$(BIN)/python -m pytest tests/test_notebooks.py

gpu-check: $(STAMP)  ## what a GPU does with reslab: speed, no waiting, time to 94 % (some 20 minutes)
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/gpu_check.py

lock:  ## the newest versions into constraints.txt
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade -e '.[dev,notebooks]'
	head -n 2 constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable >> build/constraints.txt
	mv build/constraints.txt constraints.txt

rename:  ## give the package another name: make rename NAME=mylab
	@$(PYTHON) scripts/rename.py $(NAME)

clean:  ## remove caches and builds; runs, data and the environment stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
