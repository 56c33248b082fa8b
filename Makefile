# A fresh machine needs python3 (3.11 or newer) and make; everything else goes into .venv.
#   make demo ARGS="--help"        make test ARGS="-k partition -n 2"        make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all equivalence cluster-bench gpu lint types wheel-check clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo-installed  ## Run the demo; ARGS are passed on to it
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.dev-installed  ## Run the tests; ARGS are passed on to pytest
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.dev-installed  ## Run the tests with their slow cases as well
	@$(BIN)/python -m pytest -m "" $(ARGS)

equivalence: $(VENV)/.dev-installed  ## Compare 5,000 random cases with the flat model; ARGS="--cases 500 --seed 1"
	@$(BIN)/python -m tests.equivalence.run $(ARGS)

cluster-bench: $(VENV)/.dev-installed  ## As root: TorchRec, flat and dmt on emulated hosts; ARGS="--help" lists choices
	@$(BIN)/python benchmarks/cluster_bench.py $(ARGS)

# No environment is made for it: PyTorch, Triton, pytest and the rest are the GPU machine's own, from which often nothing
# can be fetched. Name another Python where they are in it: make gpu PYTHON=.venv/bin/python. Where one folder alone comes
# back from the machine: make gpu ARGS="--out $OUT --results $OUT/block.md"
gpu:  ## On a machine with a GPU: its tests and benchmarks, 8 minutes, into benchmarks/RESULTS.md
	@$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.dev-installed  ## Check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev-installed  ## Check types
	@$(BIN)/mypy

wheel-check: $(VENV)/.dev-installed  ## Build the wheel and import all of it with the core dependencies alone
	@$(BIN)/python -m pytest -q tests/test_packaging.py

clean:  ## Remove the environment, builds and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written only once its step succeeded, so that an interrupted install is taken up again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Makefile: expected Python 3.11 or newer as '$(PYTHON)', found $$($(PYTHON) --version 2>&1);" \
			"name another one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing dmt_compile and the demo's packages into $(VENV) (about a minute the first time) ..."
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing dmt_compile with all development packages into $(VENV) (about a minute the first time) ..."
	@$(PIP) install -c constraints.txt -e '.[demo,test,dev]'
	@$(PIP) install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
# Kernels run in Triton's interpreter where there is no GPU; a CUDA build of torch has brought the Triton it pins.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --no-deps triton==3.8.0
	@touch $(VENV)/.demo-installed $@
