# On a fresh machine each of these first builds .venv; it is built again only when pyproject.toml or constraints.txt change.
# --no-compile: Python compiles what is imported, a tenth of what is installed, when it first is; a minute less.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test docs lint format clean benchmark-digits verdict-digits

demo: $(READY)
	$(BIN)/rush-bench run demo --workers 2

# one thread: networks this small gain nothing from a second one, and beside other programs two wait for each other
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# the site, into site/; every warning is an error
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict

benchmark-digits: $(READY)
	$(BIN)/rush-bench run digits --workers 2

# REFERENCE: a folder of SmoothAdv's prediction logs to draw beside the sweep of draws
verdict-digits: $(READY)
	$(BIN)/python benchmarks/verdict_digits.py $(if $(REFERENCE),--reference $(REFERENCE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "rush-bench needs Python 3.11 or newer: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@
