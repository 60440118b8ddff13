# Every target works on a machine that has only Python 3.11+ and make: it first creates .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin
# One process more than there are cores, since many tests wait for processes of their own.
PYTEST = -m pytest -n $$($(PYTHON) -c 'import os; print(os.cpu_count() + 1)') --dist worksteal

.PHONY: demo docs notebooks test test-all coverage test-oldest lint study paper study-check clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/installed
	$(BIN)/python $(PYTEST) -m "not slow and not exhaustive"

test-all: .venv/installed
	$(BIN)/python $(PYTEST) -m "not exhaustive"

coverage: .venv/installed  # test-all with the share of lines it runs; from Python 3.12 on, where counting costs almost nothing
	COVERAGE_CORE=sysmon $(BIN)/python $(PYTEST) -m "not exhaustive" --cov --cov-fail-under=90

test-oldest: .venv-oldest/installed  # every dependency of stripe at its lower bound, the developer's tools in their newest versions
	.venv-oldest/bin/python $(PYTEST) -m "not slow and not exhaustive" -W default  # old packages warn about newer ones

docs: .venv/installed
	$(BIN)/python scripts/make_docs.py

notebooks: .venv/installed  # run the notebooks and save their outputs
	$(BIN)/python scripts/run_notebooks.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deno fmt --check --line-width 120 stripe/report/page/*.js stripe/report/page/page.css
	cd stripe/report/page && cat parts.js tables.js charts.js heatmap.js sections.js page.js | $(abspath $(BIN))/deno lint -  # lint them joined, as the one script that the page contains

study: .venv/installed
	$(BIN)/python scripts/study.py forms --seeds 1 2 3

paper: .venv/installed  # the paper's four networks on CIFAR-100: days on a CPU; PAPER="--minutes 30" runs a slice of it
	$(BIN)/python scripts/study.py paper $(PAPER)

study-check: .venv/installed
	$(BIN)/python scripts/study.py check

clean:
	rm -rf .venv .venv-oldest runs figures/demo

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"  # without compiling 25,000 files: Python compiles the few that it imports
	touch $@

# The lower bounds of pyproject.toml as pip's constraints: numpy>=1.26 there is numpy==1.26 here.
LOWER_BOUNDS := import re, tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = [needs for name, needs in project["optional-dependencies"].items() if name != "dev"]; \
  print(*(re.sub(r"\[.*?\]", "", need).replace(">=", "==") for need in sum(extras, project["dependencies"])), sep="\n")

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -c '$(LOWER_BOUNDS)' > .venv-oldest/constraints.txt
	echo "protobuf<6" >> .venv-oldest/constraints.txt  # protobuf 6 rejects what onnxscript 0.2 writes
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	touch $@
