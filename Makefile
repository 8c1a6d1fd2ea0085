# Everything runs in .venv, which is made on first use. Afterwards nothing here needs a network, until
# setup.cfg or the constraints change.
#   PYTHON=python3.12        the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=https://...  a package index with CPU builds of torch, where the usual one has CUDA builds only
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
CONSTRAINTS := cluster/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

DOCUMENTED := llm frame jobs graph answers demo models runtime.taskgraph types

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model test lint types layers bench gpu notebooks keep-notebooks docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install everything into it (every other target does so when needed)

$(READY): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"daskllm needs Python 3.11 or newer, not {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv (some minutes the first time) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(if $(TORCH_INDEX),$(PIP) --constraint $(CONSTRAINTS) --no-deps --index-url $(TORCH_INDEX) torch)
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[dashboard,notebook,test,dev]'
	@$(PIP) --constraint $(CONSTRAINTS) --no-deps --upgrade --target .venv/schemas dask-kubernetes
	@touch $@

demo: $(READY) ## the bundled model on the bundled table: a local Dask cluster, answers on screen and in Parquet
	@$(BIN)/daskllm demo

demo-model: $(READY) ## train the bundled model again from nothing (its budget: daskllm/demo/train.py)
	$(BIN)/python -m daskllm.demo.train --out daskllm/demo/model --seed 0

test: lint types layers ## lint, types, layers, then every test that needs no GPU
	@$(BIN)/python -m pytest -q -m 'not gpu' $(PYTEST_ARGS)

lint: $(READY) ## ruff: rules and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY) ## mypy on the package
	@$(BIN)/mypy

layers: $(READY) ## the layers contract of the package (who may import whom)
	@$(BIN)/lint-imports --no-logo

bench: $(READY) ## throughput on a skewed work file, beside transformers, as JSON
	@$(BIN)/python tests/benchmarks/throughput.py

gpu: ## parity tests and a benchmark on a machine with CUDA, torch, cupy and triton (PYTHON= names its python)
	@$(PYTHON) -m pytest -q -m gpu tests/gpu $(PYTEST_ARGS)
	@PYTHONPATH=. $(PYTHON) tests/benchmarks/gpu.py

notebooks: $(READY) ## run every notebook from first cell to last; the files stay as they are
	@$(BIN)/python notebooks/run.py

keep-notebooks: $(READY) ## run the notebooks and keep their new outputs in the files
	@$(BIN)/python notebooks/run.py --keep

# What is imported when it is first used has to be there before pdoc looks.
docs: $(READY) ## the docstrings as pages: build/docs/index.html
	@$(BIN)/python -c 'import daskllm, pathlib, pdoc; \
	    vars(daskllm).update({name: getattr(daskllm, name) for name in daskllm.__all__}); \
	    pdoc.render.configure(docformat="google"); \
	    pdoc.pdoc("daskllm", *(f"daskllm.{room}" for room in "$(DOCUMENTED)".split()), \
	        output_directory=pathlib.Path("build/docs"))'
	@echo build/docs/index.html

clean: ## remove .venv, caches and the demo's answers
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info demo-answers
	find daskllm tests -name __pycache__ -type d -prune -exec rm -rf {} +
