# Works on a machine with nothing but git, make and python. Everything lands in .venv; ARGS are passed on:
#
#   make quickstart ARGS='--seed 7'        make test ARGS='tests/unit -q'

.DEFAULT_GOAL := help
.PHONY: help venv venv-sglang quickstart quickstart-sglang test lint format clean

VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := dev,smollm2
# What the tests and the servers need on top; about 10 GB, so the first quick start goes without.
SERVER_EXTRAS := $(EXTRAS),sglang

# One worker a core, four at most: some tests hold servers or a scheduler. tests/conftest.py says what stays together.
WORKERS ?= -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Several ranks share the cores; more threads each are slower.
export OMP_NUM_THREADS ?= 1

# A Python 3.12: of the PATH, or of pyenv. Empty where there is none.
PYTHON = $(shell for candidate in python3.12 python3 python $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python); do \
	$$candidate -c 'import sys; sys.version_info[:2] == (3, 12) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; done)

# uv: of the PATH, else a private copy from PyPI. The copy is made from / so that no .python-version stands in its way.
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/installed ## install, then train configs/quickstart.yaml to the end
	$(BIN)/dapo-megatron train configs/quickstart.yaml $(ARGS)

quickstart-sglang: $(VENV)/installed-sglang ## the same task with two SGLang servers: configs/quickstart_sglang.yaml
	$(BIN)/dapo-megatron train configs/quickstart_sglang.yaml $(ARGS)

test: $(VENV)/installed-sglang ## the whole test-suite, one worker a core
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/installed ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/installed ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/installed ## make .venv: python 3.12, pinned packages, this checkout

venv-sglang: $(VENV)/installed-sglang ## the same and SGLang: 200 packages, 10 GB

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .uv .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find dapo_megatron checkpoint_tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt | $(filter .uv/bin/uv,$(UV))
	$(if $(PYTHON),,@echo 'no Python 3.12 found: uv downloads one')
	test -x $(BIN)/python || $(UV) venv --python $(or $(PYTHON),3.12) $(VENV)
	$(UV) pip install --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m compileall -q dapo_megatron checkpoint_tools tests # an editable install is not; PYTHONDONTWRITEBYTECODE may be set
	touch $@

$(VENV)/installed-sglang: $(VENV)/installed
	$(UV) pip install --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable '.[$(SERVER_EXTRAS)]'
	touch $@

.uv/bin/uv:
	cd / && python3 -m venv '$(CURDIR)/.uv'
	echo '*' > .uv/.gitignore
	.uv/bin/python -m pip install --quiet uv
