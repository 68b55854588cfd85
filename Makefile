# `make help` lists the targets. Everything is installed into .venv and nothing outside it.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$each >/dev/null 2>&1 \
	&& $$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$each && break; done)
# pip would compile every module of every package: 2 minutes on 2 cores for what the first import does in 10 s.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet $(PIP_ARGS)

# Kernels are compiled, not run, with the Triton of torch 2.11 too, beside the installed one.
DEVICE_TRITON := $(VENV)/triton-3.6

# Environments of other programs that read what we write, each of its own.
REFEREES := .venv-referees

# Environments of the programs that ours is measured beside, which benchmarks/peers/run.py makes.
PEERS := .venv-peers

# Measuring needs torch and triton, and nothing of ours installed.
MEASURING = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# Packages are installed without bytecode (it takes two minutes) and compiled as they are imported: keep the result.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help install serve test fix bench gpu gpu-dry referees peers clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(VENV)/.installed  ## create .venv and install nybble into it

serve: $(VENV)/.installed  ## quantize the model on the first run, then serve it (MODEL= HOST= PORT= ARGS=)
	@exec $(BIN)/nybble serve $(MODEL) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.developer  ## format, lint, types, import contracts, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

fix: $(VENV)/.developer  ## format and repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## measure a running server (URL= ARGS=)
	@exec $(BIN)/nybble bench $(URL) $(ARGS)

gpu:  ## measure all there is to measure on an NVIDIA GPU, in at most nine minutes (MEASURING= ARGS=)
	@exec $(MEASURING) benchmarks/gpu/gate.py $(ARGS)

gpu-dry:  ## the same program on tiny sizes without a GPU: proves that every part runs
	@exec $(MEASURING) benchmarks/gpu/gate.py --dry $(ARGS)

referees: $(VENV)/.installed $(REFEREES)/a/.installed $(REFEREES)/b/.installed  ## other programs read what we write, and we read what they write (ARGS=)
	@exec $(BIN)/python benchmarks/referees/run.py --env-a $(REFEREES)/a --env-b $(REFEREES)/b $(ARGS)

peers: $(VENV)/.installed  ## measure ours beside llama.cpp and others, in turn; installs them first (ARGS=)
	@exec $(BIN)/python benchmarks/peers/run.py --build --environments $(PEERS) $(ARGS)

clean:  ## remove .venv, build results and tool caches
	rm -rf $(VENV) $(REFEREES) $(PEERS) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: python3 >= 3.11 not found; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot create a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing nybble into $(VENV) (first run only)"
	@$(PIP) --upgrade --constraint constraints.txt pip
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.developer: $(VENV)/.installed $(DEVICE_TRITON)/.installed
	@$(PIP) --constraint constraints.txt --group dev
	@touch $@

$(REFEREES)/%/.installed: benchmarks/referees/env-%.txt | $(BIN)/python
	@echo "installing other programs into $(@D) (first run only)"
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --no-compile --quiet $(PIP_ARGS) --requirement $<
	@touch $@

$(DEVICE_TRITON)/.installed: | $(VENV)/.installed
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) triton==3.6.0
	@touch $@
