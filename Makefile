# Everything a person and CI do with this checkout. Needs make and Python 3.11 to 3.13; nothing else by hand.
#
#   make serve             a model with prefill and decode apart on http://127.0.0.1:8000
#   make serve MODEL=qwen3-0.6b ARGS='--backend "native:d2t1p1"'
#   make test              all tests; make test ARGS="tests/engine -k scheduler"
#   make check             what CI checks: lint, types, contracts, test
#   make serve PYTHON=/opt/python3.12/bin/python3        with a Python of your choice

VENV ?= .venv
MODEL ?= smollm2-135m
ARGS ?=
PYTHON ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
FORMATTED := src tests benchmarks examples scripts

.PHONY: serve test lint types contracts docs check format clean

serve: $(VENV)/installed
	@$(BIN)/baton pull $(MODEL)
	@exec $(BIN)/baton serve $(MODEL) $(ARGS)

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check $(FORMATTED)
	@$(BIN)/ruff format --check $(FORMATTED)

types: $(VENV)/installed-dev
	@$(BIN)/mypy

contracts: $(VENV)/installed-dev
	@$(BIN)/lint-imports

check: lint types contracts test

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --fix --quiet $(FORMATTED)
	@$(BIN)/ruff format $(FORMATTED)

docs: $(VENV)/installed-dev
	@$(BIN)/python scripts/configuration.py

clean:
	rm -rf .venv .ci-venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(FORMATTED) -name __pycache__ -prune -exec rm -rf {} +

# Stamps: installed again only when the requirements changed. The checkout itself is installed editable.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing Baton into $(VENV) (minutes the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing Baton and its tools into $(VENV) (minutes the first time)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/installed

# The first Python on the path that will do; a half-made environment is not left to be taken for a whole one.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) && exit 0; rm -rf $(VENV); exit 1; \
	  fi; \
	done; \
	echo "error: Baton needs Python 3.11, 3.12 or 3.13 with venv; none of: $(or $(PYTHON),python3 python3.11 python3.12 python3.13)" >&2; \
	echo "       python3 here: $$(python3 --version 2>&1). Install one (Debian, Ubuntu: apt install python3 python3-venv)" >&2; \
	echo "       or name one: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3" >&2; \
	exit 1
