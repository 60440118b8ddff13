# Every target works on a machine with nothing but Python 3.11+ and make: it makes .venv and installs first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs notebooks test test-all coverage test-oldest lint study paper study-check clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not exhaustive"

test-all: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not exhaustive"

coverage: .venv/installed  # of the tests of test-all; from Python 3.12 on, where counting lines costs next to nothing
	COVERAGE_CORE=sysmon $(BIN)/python -m pytest -n auto --dist worksteal -m "not exhaustive" --cov --cov-fail-under=90

test-oldest: .venv-oldest/installed  # everything that stripe needs at its lower bound, the developer's tools as they are today
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not exhaustive" -W default  # old packages warn of new ones

docs: .venv/installed
	$(BIN)/python scripts/make_docs.py

notebooks: .venv/installed  # run them and keep what they show
	$(BIN)/python scripts/run_notebooks.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deno fmt --check --line-width 120 stripe/report/page/*.js stripe/report/page/page.css
	cd stripe/report/page && cat parts.js tables.js charts.js heatmap.js sections.js page.js | $(abspath $(BIN))/deno lint -  # one script, joined

study: .venv/installed
	$(BIN)/python scripts/study.py forms --seeds 1 2 3

paper: .venv/installed  # the paper's four rows on CIFAR-100: days on a CPU; PAPER="--minutes 30" does a slice of it
	$(BIN)/python scripts/study.py paper $(PAPER)

study-check: .venv/installed
	$(BIN)/python scripts/study.py check

clean:
	rm -rf .venv .venv-oldest runs figures/demo

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"  # Python compiles what it imports: few of 25,000 files
	touch $@

# The lower bounds of pyproject.toml as pip's constraints: numpy>=1.26 there is numpy==1.26 here.
LOWER_BOUNDS := import re, tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  extras = [needs for name, needs in project["optional-dependencies"].items() if name != "dev"]; \
  print(*(re.sub(r"\[.*?\]", "", need).replace(">=", "==") for need in sum(extras, project["dependencies"])), sep="\n")

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -c '$(LOWER_BOUNDS)' > .venv-oldest/constraints.txt
	echo "protobuf<6" >> .venv-oldest/constraints.txt  # later ones refuse what onnxscript 0.2 writes
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	touch $@
