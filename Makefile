# Everything that a contributor types. `make` alone says what there is.
# make PYTHON=/path/to/python3.12 setup   another interpreter;   make VENV=/elsewhere setup   another folder

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test docs notebooks browser slow exhaustive results reproduce-all

VENV ?= .venv
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(SUPPORTED)' 2>/dev/null && echo "$$python"; done) python3)
BIN := $(VENV)/bin
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
SCALE ?= mini
WORKERS ?= 2
STUDIES := $(filter-out $(if $(DATA),,camvid),$(basename $(notdir $(wildcard conf/study/*.yaml))))

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "make %-20s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create .venv with the pinned dependencies and this package (once: 4 to 5 minutes, 6 GB)

quickstart: setup ## Set up, then train ResNet-50 with EN on the UCI digits (nothing to download, about 5 minutes)
	@echo "$$(cat $(VENV)/.installed), once; not part of the training time"
	$(BIN)/exnorm train model=resnet50 norm=en data=digits

reproduce-table-%: setup ## Run a study and write its table, such as make reproduce-table-sn-table2 SEEDS=1; SCALE=small or full, DATA=DIR: real images
	$(if $(DATA),EXNORM_DATA="$(DATA)") $(BIN)/exnorm reproduce $* --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS))
	$(BIN)/exnorm table $* --scale $(SCALE)

reproduce-all: setup ## Every study at scale mini, then tables and figures; goes on where it was stopped; DATA=DIR: camvid, too
	@failed=0; for study in $(STUDIES); do \
		code=0; $(if $(DATA),EXNORM_DATA="$(DATA)") $(BIN)/exnorm reproduce $$study --scale mini $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) || code=$$?; \
		if (( code >= 128 )); then exit $$code; fi; if (( code )); then failed=1; fi; \
	done; $(BIN)/exnorm results; exit $$failed

results: setup ## Write tables, figures, verdicts and results/README.md from results/records/
	$(BIN)/exnorm results

check: setup ## Lint, formatting, types, layers, the documentation, and that tables and figures are what the records say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/exnorm results --check
	$(SITE)

docs: setup ## Build the documentation into site/, without network: open site/index.html
	$(SITE)
	@echo "open site/index.html, or type $(BIN)/mkdocs serve: that has the search, too"

notebooks: setup ## Run the notebooks of examples/ and store their outputs, figures included (about 2 minutes)
	$(BIN)/python scripts/notebooks.py

test: setup ## The tests, without the slow ones
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist loadfile

browser: ## Install Chromium with apt-get where it is missing and that is possible; the tests of pages are skipped without it
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ [[ $$(id -u) = 0 ]] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "no Chromium here: the tests of pages are skipped"

slow: setup browser ## The slow tests: whole trainings, kills, several processes, the wheel
	$(BIN)/pytest -m "slow and not exhaustive" -n $(WORKERS) --dist worksteal

exhaustive: setup ## The slow tests with all values of what they vary, such as every normalizer; before a release
	$(BIN)/pytest -m exhaustive -n $(WORKERS) --dist worksteal

# Rebuilt only when one of the two files changed; torch on Linux brings the CUDA libraries, hence the size.
$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "exnorm needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$("$(PYTHON)" -V 2>/dev/null || echo missing): type make PYTHON=/path/to/python3.12 setup" >&2; exit 1; }
	@echo "Installing into $(VENV): 4 to 5 minutes and 6 GB the first time ..."
	@start=$$SECONDS; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"; \
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'; \
	echo "installation: $$((SECONDS - start)) s, $$(du -sh "$(VENV)" | cut -f1)" | tee $@
