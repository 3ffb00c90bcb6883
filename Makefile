# make help lists what there is. Everything lives in .venv; nothing is installed outside of this folder.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) -c constraints.txt
PROMPT ?= a large red ball falls and bounces on a gray background
OUT ?= out/demo.mp4

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/.runtime ## create .venv and install Mutoscope in it

demo: .venv/.runtime ## turn a prompt into a video with the built-in model (PROMPT="..." OUT=file.mp4)
	@mkdir -p $(dir $(OUT))
	@$(BIN)/mutoscope generate "$(PROMPT)" --seed 7 --force -o $(OUT)
	@echo "To type mutoscope yourself: . .venv/bin/activate"

test: check ## lint, types and the whole test suite
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: .venv/.dev ## lint and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: .venv/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev ## the engine against its peer and this machine's ceiling
	$(BIN)/python -m benchmarks.engine

clean: ## remove what make made
	rm -rf .venv build dist *.egg-info out

# torch is named first, so that pip takes the build of constraints.txt and not a newer one.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) found. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "Installing the test tools ..."
	@$(PIP) -e '.[dev]'
	@touch $@
