# Everything that a contributor types. `make` alone says what there is.
# make PYTHON=/path/to/python3.12 setup   another interpreter;   make VENV=/elsewhere setup   another folder

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test slow

VENV ?= .venv
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(SUPPORTED)' 2>/dev/null && echo "$$python"; done) python3)
BIN := $(VENV)/bin

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create .venv with the pinned dependencies and this package (once: 4 to 5 minutes, 6 GB)

quickstart: setup ## Set up, then train ResNet-50 with EN on the UCI digits (nothing to download, at most 5 minutes)
	@echo "$$(cat $(VENV)/.installed), once; not part of the training time"
	$(BIN)/exnorm train model=resnet50 norm=en data=digits

check: setup ## Lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: setup ## The tests, without the slow ones
	$(BIN)/pytest -m "not slow"

slow: setup ## The slow tests: whole trainings, kills, several processes, the wheel
	$(BIN)/pytest -m slow

# Rebuilt only when one of the two files changed; torch on Linux brings the CUDA libraries, hence the size.
$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "exnorm needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$("$(PYTHON)" -V 2>/dev/null || echo missing): type make PYTHON=/path/to/python3.12 setup" >&2; exit 1; }
	@echo "Installing into $(VENV): 4 to 5 minutes and 6 GB the first time ..."
	@start=$$SECONDS; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	echo "installation: $$((SECONDS - start)) s, $$(du -sh "$(VENV)" | cut -f1)" | tee $@
