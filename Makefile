# Each command does its own set-up, once: a .venv in this folder, made again when pyproject.toml or setup.py changes.
#   make PYTHON=/path/to/python3.12 ...   chooses the Python     make train ARGS="--epochs 1"   passes arguments on
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train compare compare-backbones test test-all test-sanitize parity bench docs lab outputs readme clean

PYTHON ?=
ARGS ?=
JOBS ?= 2
export PYTHON

BIN := .venv/bin
RUN := .venv/ready-run
ALL := .venv/ready-all
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## *\(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

train: $(RUN) ## train a detector on DigitScenes; pictures and numbers go to runs/digits/
	$(BIN)/deformlit-train $(ARGS)

test: $(ALL) ## run every notebook and every test, within 15 minutes on two cores
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(ALL) ## the same, with packaging, browser, slow cells and the oldest torch
	$(PYTEST) $(ARGS)

test-sanitize: $(ALL) ## run the fuzz tests on a build of the native ops that checks every access
	$(BIN)/python tests/sanitize.py $(ARGS)

compare: $(ALL) ## train six detectors for 8 minutes each, and make the page of it (ARGS="--minutes 1": a glance)
	$(BIN)/python nbs/tutorials/compare_detectors.py $(ARGS)
	$(BIN)/python tests/notebooks.py tutorials/compare_detectors
	$(BIN)/nbdev-clean

compare-backbones: $(ALL) ## train seven backbones on CIFAR-10 for 6 minutes each, and make the page of it (ARGS="--minutes 1": a glance)
	$(BIN)/python nbs/tutorials/compare_backbones.py $(ARGS)
	$(BIN)/python tests/notebooks.py tutorials/compare_backbones
	$(BIN)/nbdev-clean

parity: $(ALL) ## compare again with official numbers and transformers into runs/parity/ and the page made from it
	$(PYTEST) -m "not slow" --parity=runs/parity $(ARGS)
	$(BIN)/python tests/notebooks.py parity
	$(BIN)/nbdev-clean

bench: $(ALL) ## measure the ops beside their peers into runs/bench/ and the page made from it (ARGS="--quick": two minutes)
	$(BIN)/python nbs/bench/bench.py $(ARGS)
	$(BIN)/python tests/notebooks.py bench/speed
	$(BIN)/nbdev-clean

docs: $(ALL) ## build the site into docs/_build/html/
	$(BIN)/python docs/build.py $(ARGS)

lab: $(ALL) ## open Jupyter on the notebooks
	$(BIN)/jupyter lab nbs $(ARGS)

outputs: $(ALL) ## run the notebooks again and store their outputs (ARGS=04_sample for one)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tests/notebooks.py --jobs $(JOBS) $(ARGS)
	$(BIN)/nbdev-clean

readme: $(ALL) ## make README.md from nbs/index.ipynb
	$(BIN)/python docs/scripts/readme.py

clean: ## remove what was built; keeps .venv and runs/
	rm -rf _proc _docs docs/_build build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.venv/ready-%: pyproject.toml setup.py
	@sh docs/scripts/setup.sh $*
