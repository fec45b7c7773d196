# The whole vocabulary of a contributor. Everything happens in .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test bench lint clean

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools wheel torch  # torch first: the C++ operators are built against it
	$(PIP) --no-build-isolation -e .
	touch $@

# What the tests need, without building the package a second time.
TEST = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"])
.venv/.installed-test: .venv/.installed
	$(PIP) $$($(BIN)/python -c '$(TEST)')
	touch $@

# All stages on the embedded Colored Digits; the same command again resumes or shows the results.
demo: setup
	$(BIN)/ddb-fast run digits --out runs/demo

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: .venv/.installed-test
	$(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# On this machine's CPU; what a GPU does is measured by benchmarks/suite.py.
bench: .venv/.installed-test
	$(BIN)/pytest benchmarks --benchmark-only

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
