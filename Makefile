# make setup | demo | test | check | gpu-test | gpu-sanitize | gpu-bench
PYTHON ?= python3
PYTEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# The computations of tests and checks are small: one thread a process is the fastest.
ONE_THREAD := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

.PHONY: help setup demo test check format gpu-test gpu-sanitize gpu-bench clean

help:
	@echo "make setup      create $(VENV) with the pinned packages and Longstride itself"
	@echo "make demo       train a small Sparse Transformer on the source of Python's standard library, then sample"
	@echo "make test       run the tests"
	@echo "make check      formatting, lint, types, layers, examples in the documentation"
	@echo "make format     rewrite the code in the project's format"
	@echo "make gpu-test   run the tests that need a CUDA device, with the machine's own python3"
	@echo "make gpu-sanitize  look for bad memory accesses and races in the Triton kernels with compute-sanitizer"
	@echo "make gpu-bench  measure attention, decoding and training on a CUDA device, with the machine's own python3"
	@echo "make clean      remove $(VENV)"

setup: $(STAMP)

$(STAMP): requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Longstride needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# A demo starts afresh each time.
demo: setup
	rm -rf runs/demo
	$(BIN)/longstride train --output runs/demo

test: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not gpu" tests

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)
	$(BIN)/lint-imports
	$(ONE_THREAD) $(BIN)/python -m pytest -q --doctest-modules src tests/test_docs.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Side by side where pytest-xdist is there: compiling is what takes most of the time.
gpu-test:
	PYTHONPATH=src $(ONE_THREAD) python3 -m pytest -p no:benchmark tests/gpu \
	  $$(python3 -c 'from importlib.util import find_spec; print("-n 8 --dist worksteal" if find_spec("xdist") else "")')

gpu-sanitize:
	for tool in memcheck racecheck; do \
	  PYTHONPATH=src compute-sanitizer --tool $$tool --error-exitcode 1 python3 tests/gpu/sanitize.py || exit 1; \
	done

gpu-bench:
	PYTHONPATH=src TORCHINDUCTOR_COMPILE_THREADS=1 python3 benchmarks/attention_gpu.py
	PYTHONPATH=src TORCHINDUCTOR_COMPILE_THREADS=1 python3 benchmarks/decode_gpu.py
	PYTHONPATH=src TORCHINDUCTOR_COMPILE_THREADS=1 python3 benchmarks/encoders.py --device cuda --rounds 20
	PYTHONPATH=src TORCHINDUCTOR_COMPILE_THREADS=1 python3 benchmarks/training.py

clean:
	rm -rf $(VENV)
