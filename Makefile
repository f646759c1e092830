# Everything sets up .venv by itself when needed, with pip alone.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# One thread per process: the suites start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-cluster test-ui fuzz chaos lint bench-engine bench-planner bench-unlike bench-accuracy bench-precision bench-peers bench-service bench-sweep bench-large clean

demo: $(STAMP)
	deploy/demo.sh $(BIN)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Three hosts in network namespaces of this machine; needs root, ip and tc.
test-cluster: $(STAMP)
	$(BIN)/python -m tests.cluster

# The pages in chromium (Debian's package); pictures go to .bench/ui.
test-ui: $(STAMP)
	D2FT_SHOTS=1 $(BIN)/python -m pytest tests/ui
	$(BIN)/python -m tests.bench.ui

# The whole API by generated requests, for FUZZ_SECONDS.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.api

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-engine: $(STAMP)
	$(BIN)/python -m tests.bench.engine

bench-planner: $(STAMP)
	$(BIN)/python -m tests.bench.planner

bench-unlike: $(STAMP)
	$(BIN)/python -m tests.bench.unlike

bench-accuracy: $(STAMP)
	$(BIN)/python -m tests.bench.accuracy

bench-precision: $(STAMP)
	$(BIN)/python -m tests.bench.precision

bench-peers: $(STAMP)
	$(BIN)/python -m tests.bench.peers
	$(BIN)/python -m tests.bench.peers --cores 0 1 1 --out peers-unlike

bench-service: $(STAMP)
	$(BIN)/python -m tests.bench.service
	$(BIN)/python -m tests.bench.killed
	$(BIN)/python -m tests.bench.first_step

bench-sweep: $(STAMP)
	$(BIN)/python -m tests.bench.sweep

bench-large: $(STAMP)
	$(BIN)/python -m tests.bench.large

clean:
	rm -rf $(VENV) .bench .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch first and by exact version, and the rest as it was tested: without that pip may walk through years of releases.
$(STAMP): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint deploy/constraints.txt
	touch $(STAMP)
