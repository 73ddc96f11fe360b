# `make` alone prints what it can do.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
QUICK  := tests/lint tests/model tests/scripts tests/unit

# Tests start some hundred processes: without bytecode each of them compiles the service anew.
unexport PYTHONDONTWRITEBYTECODE

# Tests write some gigabytes: in memory, where there is room for them, that takes a third less processor time.
MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR > 1 && $$4 > 6000000 {print "/dev/shm"}')
quick test chaos: export TMPDIR := $(or $(TMPDIR),$(MEMORY),/tmp)

.DEFAULT_GOAL := help
.PHONY: help install run demo check quick test chaos load bench clean

help: ## Print the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make the environment in .venv, and nothing else

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coupon-svc needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	@echo "Installing the packages into $(VENV); this takes a minute or two, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: install ## The whole service on 127.0.0.1:8080, embedded servers included; make run ARGS='--port 9090'
	@exec $(BIN)/coupon-svc dev $(ARGS)

demo: install ## The life of a coupon, step by step, without a human
	@exec $(BIN)/coupon-svc demo

check: install ## Style, types, import direction, dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/vulture

quick: check ## `check`, and the tests that take half a minute: units, the model, scripts, docs
	$(BIN)/python -m pytest -n $(or $(JOBS),2) --dist worksteal --hypothesis-profile quick $(QUICK)

test: install ## All tests, against servers they start themselves
	$(BIN)/python -m pytest -n $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder

chaos: install ## Faults under load, 100 seeded runs (RUNS=…): clients record, then everything is compared
	$(BIN)/python -m pytest -m "chaos and not alone" -n $(or $(JOBS),3) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m tests.chaos --runs $(or $(RUNS),100)

load: install ## Load a service of its own, time it and audit every answer; make load ARGS='--scenario checkout'
	@exec $(BIN)/coupon-svc load $(ARGS)

bench: install ## The figures of docs/benchmarks.md, about 20 minutes on a quiet machine; make bench ARGS=--quick, ARGS=--growth
	@$(BIN)/python -m bench $(ARGS)
	@$(BIN)/python -m tools.readme

clean: ## Remove the environment and the data of `make run`
	rm -rf $(VENV) .data
