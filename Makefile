# make demo · make test · make lint · make bench · make gpu: each starts from a bare checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("metaopt needs python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/metaopt demo

test: $(STAMP) lint
	$(BIN)/python -m pytest --numprocesses 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --learned
	$(BIN)/python benchmarks/unroll.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/mup.py
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/meta_train.py
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
