# make quickstart   installs what is missing and compresses the built-in example
# make test         installs what is missing and runs the default test suite (some 12 minutes on 2 cores)
# make test-full    also the long tiers
# make dev          every extra and developer tool in the same environment
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS := constraints.txt

.PHONY: quickstart test test-full dev lint clean

quickstart: $(VENV)/.installed
	$(BIN)/edgekd compress recipes/quickstart.yaml

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

test-full: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "slow or not slow"

dev: $(VENV)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy --strict edgekd && $(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgekd needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp file makes both installs idempotent; they run again when the dependencies change.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	$(BIN)/python -m compileall -q edgekd  # an editable install leaves it to the first run, and an environment may forbid that
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
