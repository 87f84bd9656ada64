# Common tasks, run in the virtual environment $(VENV). `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
IN_VENV := $(PYTHON) scripts/venv.py $(VENV)
WORKERS ?= 2
# The build of PyTorch: `make demo TORCH=cpu`. The default is that of the package index.
TORCH ?=

# What is installed in $(VENV), one file per set of extras. A new pyproject.toml or constraints.txt updates it.
BASE := $(VENV)/.base$(TORCH)
DEV := $(VENV)/.dev$(TORCH)
NOTEBOOKS := $(VENV)/.notebooks$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup demo ablation-demo test test-slow lint format docs docs-test docs-serve notebooks gpu-check lock rename clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(DEV)  ## create the virtual environment with all development tools

$(DEV): EXTRAS := [dev]
$(NOTEBOOKS): EXTRAS := [dev,notebooks]
$(BASE) $(DEV) $(NOTEBOOKS): pyproject.toml constraints.txt
	@echo "Installing reslab$(EXTRAS) into $(VENV): at most 7 GB, of which 5 GB are PyTorch and its GPU libraries"
	@$(IN_VENV) uv pip install -c constraints.txt -e '.$(EXTRAS)' $(if $(TORCH),--torch-backend $(TORCH))
	@echo "Compiling the modules that a run imports"
	@env -u PYTHONDONTWRITEBYTECODE $(IN_VENV) python -c "import reslab.experiment, wandb, matplotlib.pyplot"
	@touch $(if $(EXTRAS),$(BASE)) $(if $(findstring notebooks,$@),$(DEV)) $@

demo: $(BASE)  ## train and test a ResNet on handwritten digits (one minute on a laptop)
	@$(IN_VENV) reslab fit --config configs/experiment/digits.yaml

ablation-demo: $(BASE)  ## run a study of three arms × five seeds on handwritten digits (two minutes on two cores)
	@$(IN_VENV) reslab ablate run configs/ablation/digits_shortcuts.yaml --jobs 2

# One thread per test process: more threads than cores are much slower.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(DEV)  ## run the tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(DEV)  ## run the slow tests (20 minutes on two cores); TESTS=FILES selects some
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(TESTS)

lint: $(DEV)  ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)  ## format the code and sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(DEV)  ## build the documentation in build/site; a broken link is an error
	@$(BIN)/mkdocs build --strict --site-dir build/site

docs-test: export OMP_NUM_THREADS ?= 1

docs-test: $(DEV)  ## run the code blocks of the README and docs, and show the site in a browser (about ten minutes)
	@$(BIN)/python -m pytest -n $(WORKERS) tests/test_docs.py tests/test_site.py -m slow

docs-serve: $(DEV)  ## show the documentation at http://127.0.0.1:8000
	@$(BIN)/mkdocs serve

notebooks: $(NOTEBOOKS)  ## run the notebooks from top to bottom
	@$(BIN)/python -m pytest tests/test_notebooks.py -m slow

gpu-check: $(DEV)  ## measure on a GPU: speed, device syncs, accuracy on CIFAR-10 (about an hour, estimated)
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/gpu_check.py

lock: $(BASE)  ## update constraints.txt to the newest versions
	@mkdir -p build
	@head -n 2 constraints.txt > build/constraints.txt
	@$(IN_VENV) uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --upgrade --no-header --no-annotate \
		--extra dev --extra notebooks pyproject.toml -o build/locked.txt
	@cat build/locked.txt >> build/constraints.txt && mv build/constraints.txt constraints.txt

rename:  ## rename the package: make rename NAME=mylab
	@$(PYTHON) scripts/rename.py $(NAME)

clean:  ## remove caches and builds; keep runs, data and the environment
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
