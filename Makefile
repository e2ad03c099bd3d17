# Every target installs what it needs into .venv, once; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
MODELS ?= models
SCALE ?= full
CLIENTS ?= clients
STUDY ?=

BIN := $(VENV)/bin
DIFFVL := $(BIN)/diffvl
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help install test test-clients test-gpu test-slow lint types check demo demo-models recipe-llava study clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

# --- installation ----------------------------------------------------------------------------------------------------------

install: $(STAMP) ## make .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffvl needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[demo,dev,video]'
	touch $@

# --- checks ----------------------------------------------------------------------------------------------------------------

test: $(STAMP) ## the tests: CPU, offline, a process for each core
	$(BIN)/python -m pytest -n logical --dist loadfile

test-gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

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

# The recipe names runs/demo-data, so these two do not move with RUNS.
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

LLAVA_MODEL := qwen2.5-7b
# One process for each GPU.
LAUNCH = $(BIN)/accelerate launch -m diffvl.cli
LLAVA_OUT := $(RUNS)/$(LLAVA_MODEL)
ifeq ($(SCALE),smoke)
# The same recipe file on random stand-ins, with sizes and steps that a CPU does in seconds.
SMOKE := $(RUNS)/smoke
LAUNCH = $(DIFFVL)
LLAVA_MODEL := $(SMOKE)/models/trunk-qwen2
LLAVA_OUT := $(SMOKE)/llava
ALIGN_DATA := $(SMOKE)/data/align.json
DIFFUSE_DATA := $(SMOKE)/data/train.json
LLAVA_SETTINGS := prepare.vision_tower=$(SMOKE)/models/tower-siglip \
  $(foreach stage,stages.align stages.diffuse,$(addprefix $(stage).,epochs=null steps=2 batch_size=2 accumulation=2 \
    precision=fp32 log_every=1 data.max_length=512 data.workers=0))
endif

recipe-llava: $(STAMP) ## DiffusionVL's two stages: ALIGN_DATA=a.json DIFFUSE_DATA=b.json, or SCALE=smoke
ifeq ($(SCALE),smoke)
	$(BIN)/python -m diffvl.demo.standins $(SMOKE)/models
	$(DIFFVL) shapes $(SMOKE)/data --align 8 --train 8 --test 4
	rm -rf $(LLAVA_OUT)
else
	@[ -n "$(ALIGN_DATA)" ] && [ -n "$(DIFFUSE_DATA)" ] || { echo "name the data: make recipe-llava ALIGN_DATA=blip_laion_cc_sbu_558k.json DIFFUSE_DATA=llava_next.json, or try it small: make recipe-llava SCALE=smoke" >&2; exit 2; }
endif
	$(LAUNCH) convert $(LLAVA_MODEL) --recipe llava --out $(LLAVA_OUT) $(addprefix --set ,$(LLAVA_SETTINGS) \
	  stages.align.data.train=$(ALIGN_DATA) stages.diffuse.data.train=$(DIFFUSE_DATA))

# --- the published methods against their AR twin ------------------------------------------------------------------------------

study: demo-models ## the fidelity study, a night on two cores; again: goes on; STUDY="--only a,b --seeds 1" does a part
	$(BIN)/python -m tools.study --out $(RUNS)/study --models $(MODELS) --page docs $(STUDY)

clean: ## remove .venv and caches; runs and models stay
	rm -rf .venv dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
