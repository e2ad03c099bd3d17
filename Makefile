# Every target installs what it needs into .venv, once; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
MODELS ?= models
SCALE ?= full
CLIENTS ?= clients
GPU_OUT ?= gpu-report
GPU_PYTHON ?= $(VENV)/bin/python
STUDY ?=

BIN := $(VENV)/bin
DIFFVL := $(BIN)/diffvl
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help install test test-clients test-gpu gpu-report test-slow lint types check demo demo-models recipe-llava study clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

# --- installation ----------------------------------------------------------------------------------------------------------

install: $(STAMP) ## make .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffvl needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo,dev,serve,video]'
	touch $@

# --- checks ----------------------------------------------------------------------------------------------------------------

test: $(STAMP) ## the tests: CPU, offline, a process for each core
	$(BIN)/python -m pytest -n logical --dist loadfile

test-gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# Without a network GPU_PYTHON is an environment that was carried along (docs/speed.md), and .venv is not made.
gpu-report: $(if $(filter $(VENV)/bin/python,$(GPU_PYTHON)),$(STAMP)) ## all that waits for a GPU, in eight minutes, into gpu-report/; GPU_ARGS="--only decode"
	$(GPU_PYTHON) -m tools.gpu_report --out $(GPU_OUT) $(GPU_ARGS)

test-clients: $(STAMP) ## exports in other people's programs; CLIENTS is the folder with them (docs/interop.md)
	CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -m client tests/clients -rs

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## ruff and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

types: $(STAMP) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test ## everything that CI runs: lint, types, tests

# --- the demo: SmolLM2-135M learns to see coloured shapes --------------------------------------------------------------------

# The recipe names runs/demo-data.
DEMO := runs/demo
DEMO_DATA := runs/demo-data
SMOLLM := $(MODELS)/smollm2-135m-instruct
DINO := $(MODELS)/dinov2-small

demo-models: $(STAMP) ## the demo's two pretrained models
	@[ -d $(SMOLLM) ] && [ -d $(DINO) ] || $(BIN)/python tools/fetch_demo_models.py $(MODELS)

demo: demo-models ## the whole way on this machine's CPU; again: goes on from what is done
	$(DIFFVL) shapes $(DEMO_DATA)
	$(DIFFVL) convert $(SMOLLM) --recipe demo --set prepare.vision_tower=$(DINO) --out $(DEMO) --resume
	$(DIFFVL) evaluate $(DEMO)/diffuse --data $(DEMO_DATA)/test.json --limit 100
	$(DIFFVL) bench modes $(DEMO)/diffuse --data $(DEMO_DATA)/test.json --limit 12
	@echo 'report:  $(DEMO)/diffuse/report.html   (open it in a browser)'
	@echo 'go on:   $(DIFFVL) generate $(DEMO)/diffuse --image $(DEMO_DATA)/images/test/00001.png --prompt "Describe the picture." --watch'
	@echo '         $(DIFFVL) convert --from $(DEMO)/align --stage diffuse --recipe demo --set stages.diffuse.steps=400 --out runs/demo-long'

# --- the paper's recipe ------------------------------------------------------------------------------------------------------

# What is set is handed on; a 0 is a no.
yes = $(if $(filter-out 0,$($(1))),$(2))
RECIPE_WORDS = --scale '$(SCALE)' $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(MODEL),--model '$(MODEL)') \
  $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)') $(if $(GPUS),--gpus '$(GPUS)') $(if $(FOR),--for '$(FOR)') \
  $(if $(LAUNCH),--launch '$(LAUNCH)') $(call yes,DRY_RUN,--dry-run) $(call yes,YES,--yes) $(call yes,CONTROL,--control)

recipe-llava: $(STAMP) ## DiffusionVL's two stages: data, plan, training, figures (docs/scale.md); SCALE=smoke YES=1: in a minute
	@$(BIN)/python -m tools.recipe_llava $(RECIPE_WORDS)

# --- the published methods against their AR twin ------------------------------------------------------------------------------

study: demo-models ## the fidelity study, a night on two cores; again: goes on; STUDY="--only a,b --seeds 1" does a part
	$(BIN)/python -m tools.study --out $(RUNS)/study --models $(MODELS) --page docs $(STUDY)

clean: ## remove .venv and caches; runs and models stay
	rm -rf .venv dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
