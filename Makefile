# Everything runs in .venv, which is made on first use; it needs python3 (3.11 or later) and pip.

PYTHON ?= python3
PIP_VERSION := 26.3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# Idle threads of torch then leave the cores to numba's.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo demo-generate test check fast slow docs bench clean

help:  ## Say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train both ways on real flights, in pairs, and leave a receipt in runs/demo
	@echo "== demo"
	$(BIN)/vitalfew demo

demo-generate: $(VENV)/.demo  ## Follow real text with half and a fifth of the KV cache; downloads a small model (93 MB) once
	@echo "== demo-generate"
	$(BIN)/vitalfew demo generate

test: check fast slow docs  ## Run every check, every test, and build the documentation
	@echo "== all passed"

check: $(VENV)/.dev  ## Lint, format, types, layers, dependencies
	@echo "== check"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .

fast: $(VENV)/.dev  ## Run the quick tests and the examples of the docstrings
	@echo "== fast tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS)

slow: $(VENV)/.dev  ## Run the slow tests
	@echo "== slow tests"
	$(BIN)/python -m pytest -q -m slow

docs: $(VENV)/.dev  ## Build the documentation into docs/_build/html; a warning is an error
	@echo "== docs"
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.demo  ## Run the benchmarks into benchmarks/results and their figures into the cards
	@echo "== bench"
	@missed=0; \
	for name in optimizer end_to_end; do \
		echo "== $$name"; \
		$(BIN)/python benchmarks/embeddings/$$name.py --out benchmarks/results/$$name.json || missed=1; \
	done; \
	echo "== lookahead"; \
	$(BIN)/python benchmarks/tiers/lookahead.py --out benchmarks/results/lookahead.json || missed=1; \
	$(BIN)/python docs/figures.py && exit $$missed

clean:  ## Remove .venv and what the checks have cached
	rm -rf $(VENV) docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/bin/pip:
	@echo "== make $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("python 3.11 or later is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q pip==$(PIP_VERSION)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "== install vitalfew and what it runs with"
	$(BIN)/python -m pip install -q -c constraints.txt torch -e ".[all]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "== install vitalfew, its tests, checks and documentation"
	$(BIN)/python -m pip install -q -c constraints.txt torch -e ".[all]" --group dev
	@touch $@ $(VENV)/.demo
