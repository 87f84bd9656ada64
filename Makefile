# Common tasks, run in the virtual environment $(VENV). `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo ablation-demo test test-slow lint format notebooks gpu-check lock rename clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create the virtual environment with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reslab needs Python 3.11 or newer: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,notebooks]'
	@touch $@

demo: $(STAMP)  ## train and test a ResNet on handwritten digits (one minute on a laptop)
	@$(BIN)/reslab fit --config configs/experiment/digits.yaml

ablation-demo: $(STAMP)  ## run a study of three arms × five seeds on handwritten digits (two minutes on two cores)
	@$(BIN)/reslab ablate run configs/ablation/digits_shortcuts.yaml --jobs 2

# One thread per test process: more threads than cores are much slower.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(STAMP)  ## run the tests
	@$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)  ## run the slow tests
	@$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(STAMP)  ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## format the code and sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(STAMP)  ## run the notebooks from top to bottom
	@$(BIN)/python -m pytest tests/test_notebooks.py -m slow

gpu-check: $(STAMP)  ## measure on a GPU: speed, device syncs, time to 94 % on CIFAR-10 (about 20 minutes)
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/gpu_check.py

lock:  ## update constraints.txt to the newest versions
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade -e '.[dev,notebooks]'
	head -n 2 constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable >> build/constraints.txt
	mv build/constraints.txt constraints.txt

rename:  ## rename the package: make rename NAME=mylab
	@$(PYTHON) scripts/rename.py $(NAME)

clean:  ## remove caches and builds; keep runs, data and the environment
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
