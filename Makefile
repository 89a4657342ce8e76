# make demo        train on handwritten digits without labels, score the result, draw it
# make demo-seeds  the same for five seeds, with mean and standard deviation
# make test        the test suite
# make lint        the linter

PYTHON ?= python3
BIN := .venv/bin

# The demo's tensors are small: a second thread gains little, and on a busy machine threads wait for each other.
DEMO := OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: demo demo-seeds test lint clean

# uv installs in half a minute what pip installs in a few; the result is the same.
.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 2; }
	@if command -v uv >/dev/null; then uv venv -q --allow-existing --python $(PYTHON) .venv && uv pip install -q --python $(BIN)/python -r requirements.txt; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt; fi
	@touch $@

demo: .venv/installed
	$(DEMO) train.py --output-dir runs/demo --eval-every 10
	$(DEMO) cls_eval.py --checkpoint runs/demo/checkpoint.pt --pixel-kmeans

demo-seeds: .venv/installed
	@for seed in 0 1 2 3 4; do \
		$(DEMO) train.py --seed $$seed --output-dir runs/demo-seeds/$$seed && \
		$(DEMO) cls_eval.py --checkpoint runs/demo-seeds/$$seed/checkpoint.pt || exit 1; done
	$(BIN)/python -m src.results table runs/demo-seeds/*

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs
