PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test check clean
.DEFAULT_GOAL := help

help:  ## show these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

install: $(READY)  ## create .venv with exact versions of everything

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## fine-tune, quantize, compare and export a small ViT on this machine (about 2 minutes)
	$(BIN)/vitopt run recipes/quickstart.yaml

# One worker per core, so one thread per worker: more only get in each other's way.
test: check  ## all checks and tests; those that need a GPU skip without one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

check: $(READY)  ## ruff, mypy and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info
