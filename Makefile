# `make demo` and `make test` do all set-up themselves, in .venv; `make help` lists the rest.
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv; otherwise the first that fits is taken.

FITS := import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTEST := $(BIN)/pytest -q

.PHONY: help setup demo test lint types unit compiled interpreted gpu long faults bench docs release format clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

$(BIN)/python:
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { echo "fastalign needs Python 3.11, 3.12 or 3.13 with its venv module;" \
		"none was found on the PATH (Debian: apt install python3-venv), or name one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

# The build's own requirements come first, pinned like the rest, so that the build needs no isolated environment. The
# extension is left to `setup`, which compiles in place, only what has changed, and shows what the compiler says.
.venv/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing fastalign and its tools into .venv: some minutes, once"
	@$(PIP) setuptools pybind11
	@FASTALIGN_BUILD_EXT=0 $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

setup: .venv/.installed ## the virtual environment and, where there is a compiler, the C++ kernels
	@$(BIN)/python setup.py -q build_ext --inplace

demo: setup ## train tiny models on a built-in language; a few minutes, no download
	$(BIN)/fastalign demo

test: lint types unit compiled interpreted ## everything CI runs

lint: setup
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet

types: setup
	$(BIN)/mypy

unit: setup
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder tests --ignore tests/kernels # some tests wait for processes

compiled: setup # Triton kernels, ahead of time for several GPUs; starts processes of its own
	$(PYTEST) tests/kernels

interpreted: setup # in another process: Triton chooses its interpreter when a kernel is decorated
	TRITON_INTERPRET=1 $(PYTEST) -n 2 tests/kernels/interpreted
	TRITON_INTERPRET=1 $(PYTEST) -n 2 tests/ops tests/linear -k triton

gpu: setup ## the tests that need a CUDA device, then speed and memory of all that runs on it; SUITE='--minutes 9'
	$(PYTEST) -m gpu tests
	$(BIN)/python benchmarks/suite.py $(SUITE)

long: setup ## the studies that take minutes
	$(PYTEST) -m long tests

faults: setup ## kills, full disks, flipped bits, bad input: their long form, and a tally
	$(PYTEST) -n 2 --dist load -m 'long or not long' tests/faults tests/fuzz

bench: setup ## the fused head and a PPO update's against their peers, on this machine
	$(BIN)/python benchmarks/linear_logps.py
	$(BIN)/python benchmarks/ppo_step.py

docs: setup ## the site, in build/docs; a warning is an error
	@.ci/docs

release: setup ## sdist and wheel in dist/, proved in clean environments
	@.ci/release

format: setup ## rewrite the tree as the linter wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove builds, caches and outputs of the demo
	rm -rf build dist *.egg-info kernels/_C.* demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf .venv
