PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A GPU machine without a network has its own torch and no .venv.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help install demo test check faults gpu clean
.DEFAULT_GOAL := help

help:  ## show these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

install: $(READY)  ## create .venv with exact versions of everything

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## fine-tune, quantize, compare and export a small ViT on this machine (about 3 minutes)
	$(BIN)/vitopt run recipes/quickstart.yaml

# One worker per core, so one thread per worker: more only get in each other's way.
test: check  ## all checks and tests; those that need a GPU skip without one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

check: $(READY)  ## ruff, mypy and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

faults: $(READY)  ## 6,000 bad inputs and 200 kills of a run, into benchmarks/results/ (half an hour)
	$(BIN)/python -m pytest -m faults tests/faults
	OMP_NUM_THREADS=1 $(BIN)/python scripts/strangers.py --json benchmarks/results/strangers.json
	OMP_NUM_THREADS=1 $(BIN)/python scripts/kills.py --json benchmarks/results/kills.json

gpu:  ## what only a GPU shows, in under 9 minutes; OUTPUT=DIR holds the results, else benchmarks/results/ and README
	@$(GPU_PYTHON) scripts/device_benchmark.py --device cuda $(if $(OUTPUT),--output $(OUTPUT)); status=$$?; \
	$(if $(OUTPUT),,$(GPU_PYTHON) scripts/performance_table.py;) exit $$status

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info
