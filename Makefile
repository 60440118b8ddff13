# Every target works on a machine with nothing but Python 3.11+ and make: it makes .venv and installs first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint study study-check clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --cov --cov-report=term --cov-fail-under=90

test-all: test
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow  # without coverage, which makes the fuzzing take 1.6 times as long

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deno fmt --check --line-width 120 stripe/report/page.js stripe/report/page.css
	$(BIN)/deno lint stripe/report/page.js

study: .venv/installed
	$(BIN)/python scripts/study.py forms --seeds 1 2 3

study-check: .venv/installed
	$(BIN)/python scripts/study.py check

clean:
	rm -rf .venv runs figures/demo

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
