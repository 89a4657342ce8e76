# `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin

# The demo's tensors are small: a second thread gains little, and on a busy machine threads wait for each other.
DEMO := OMP_NUM_THREADS=1 $(BIN)/python

# The tests run in one process per core, at most four; files with slow tests start first. `make test SEED=1` shuffles them.
ORDER := $(if $(SEED),--randomly-seed=$(SEED),-p no:randomly)
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ORDER)

.PHONY: help demo demo-seeds test test-all lint mutations campaign clean

help:                  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

# uv installs in a minute what pip installs in a few; the result is the same. --require-hashes refuses a file that differs
# from the one that was pinned.
.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 2; }
	@if command -v uv >/dev/null; then uv venv -q --allow-existing --python $(PYTHON) .venv && uv pip install -q --require-hashes --python $(BIN)/python -r requirements.txt; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt; fi
	@touch $@

demo: .venv/installed  ## train on handwritten digits without labels, score the result, draw it
	$(DEMO) train.py --output-dir runs/demo --eval-every 10
	$(DEMO) cls_eval.py --checkpoint runs/demo --pixel-kmeans

demo-seeds: .venv/installed  ## the same for five seeds, with mean and standard deviation
	@for seed in 0 1 2 3 4; do \
		$(DEMO) train.py --seed $$seed --output-dir runs/demo-seeds/$$seed && \
		$(DEMO) cls_eval.py --checkpoint runs/demo-seeds/$$seed || exit 1; done
	$(BIN)/python -m src.results table runs/demo-seeds/*

test: .venv/installed  ## run the fast tests, a few minutes
	$(TESTS) -m "not slow"

test-all: .venv/installed  ## run all tests, the slow ones (several ranks, Slurm, compilers) too
	$(TESTS)

lint: .venv/installed  ## run the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutations: .venv/installed  ## break the code on purpose in many places and see that a test notices
	$(BIN)/python -m tests.mutations

campaign: .venv/installed  ## break runs and files in many ways and see that nothing is lost, several hours
	$(BIN)/python -m tests.campaign

clean:                 ## remove the environment and the runs
	rm -rf .venv runs
