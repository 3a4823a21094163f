# `make demo` is all that a newcomer needs; everything runs in .venv, made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Installed first and alone: the largest part, which then is found already there.
TORCH := torch==2.13.0

.PHONY: demo setup test soak lint clean

demo: setup
	$(BIN)/longshore demo

setup: $(STAMP)

# Made anew only when what it is made from changes.
$(STAMP): pyproject.toml constraints.txt
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11 python3.14; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Longshore needs Python 3.11 or newer: install one, or name it with 'make PYTHON=/path/to/python3.11'" >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -c '' 2>/dev/null; then rm -rf $(VENV) && "$$found" -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Two processes may share two cores with servers that the tests start: a time limit that a test keeps alone may be missed.
# What failed gets one more run by itself, and has to pass there.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile || \
	    $(BIN)/python -m pytest --last-failed --last-failed-no-failures none

# Ten thousand worlds that move and drain much, with deaths at any message; goes on where it was interrupted. `rm .soak.jsonl` begins anew.
soak: setup
	$(BIN)/longshore chaos soak --seeds 10000 --state .soak.jsonl

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
