# Every target sets up what it needs in .venv the first time and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
SHELL := /bin/bash

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   draw data, cache a teacher, train a student without and with it, compare (minutes, CPU)"
	@echo "make test   the tests"
	@echo "make lint   ruff, mypy and the import contract"
	@echo "make bench  speed and memory, as a table and build/bench.json"

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	@touch $@

.venv/ready-bench: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@

test: .venv/ready
	$(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

bench: .venv/ready-bench
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv build
