# Every target sets up what it needs in .venv the first time and is quick the second time.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: redteam demo test test-oldest lint bench gpu gpu-results results clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   draw data, cache a teacher, train a student without and with it, compare (minutes, CPU)"
	@echo "make test   the tests; make test-oldest: with the oldest PyTorch that is supported, in .venv-oldest"
	@echo "make lint   ruff, mypy and the import contract"
	@echo "make redteam  kills, flips, crafted stores, bad wires, broken files and mistakes by the hundred (half an hour)"
	@echo "make bench  speed and memory, as a table and build/bench.json"
	@echo "make gpu    on a machine with a GPU: the tests and benchmarks that need one, 12 minutes at most, build/gpu.json"
	@echo "make gpu-results  there: a teacher, its store and students of it; AP, speed and memory in 25 minutes"
	@echo "make results  the tables and the plot of docs/results.md (hours; stopped, it goes on where it was)"

.venv/ready: setup.cfg pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[test,lint]'
	@touch $@

.venv-oldest/ready: setup.cfg pyproject.toml tests/constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint tests/constraints-oldest.txt --editable '.[test]'
	@touch $@

.venv/ready-bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[bench]'
	@touch $@

test: .venv/ready
	$(BIN)/python -m pytest -n 2

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -n 2

redteam: .venv/ready
	$(BIN)/python -m tests.redteam

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

bench: .venv/ready-bench
	$(BIN)/python -m tests.benchmarks

# Installs nothing: PyTorch is the machine's own, and what else it lacks lies in build/packages (docs/gpu.md).
ON_GPU := PYTHONPATH=build/packages $(if $(wildcard .venv/ready),$(BIN)/python,$(PYTHON))

gpu:
	@$(ON_GPU) -m tests.gpu

gpu-results:
	@$(ON_GPU) -m tests.gpu.results

results: .venv/ready
	$(BIN)/python -m tests.results

# The demo's teacher is kept in docs/demo with the commands that made it; everything else is made here. Each product is
# a file that appears when it is finished, so that a demo that was stopped goes on where it was.
DEMO := build/demo
TEACHER := docs/demo/teacher.safetensors
RUNS := $(addprefix $(DEMO)/runs/,teacher plain distilled)

demo: $(addsuffix /finished,$(RUNS)) $(DEMO)/detections.png
	@$(BIN)/python -m teacher_dump inspect $(DEMO)/store.zarr
	@$(BIN)/python -m student_train compare $(RUNS) --out $(DEMO)/curves.png
	@echo "detections: $(DEMO)/detections.png"

$(DEMO)/data: | .venv/ready
	$(BIN)/python -m common.synthetic --out $@.partial --train-images 1000 --val-images 300
	mv $@.partial $@

$(DEMO)/dumped: | $(DEMO)/data
	$(BIN)/python -m teacher_dump --data $(DEMO)/data --sizes 128 --teacher $(TEACHER) --views 4 --batch-size 16 \
		--out $(DEMO)/store.zarr
	touch $@

$(DEMO)/runs/teacher/finished: | $(DEMO)/data
	$(BIN)/python -m student_train evaluate --data $(DEMO)/data --sizes 128 --checkpoint $(TEACHER) --record $(@D)
	touch $@

# Same student, same start, same samples in the same order, same steps; only the losses differ.
$(DEMO)/runs/plain/finished: LOSSES := --logits-weight 0 --feature-weight 0 --assignment-weight 0
$(DEMO)/runs/distilled/finished: LOSSES := --logits-weight 1 --feature-weight 1000 --assignment-weight 1
$(DEMO)/runs/%/finished: | $(DEMO)/dumped
	$(BIN)/python -m student_train --cache $(DEMO)/store.zarr --data $(DEMO)/data --student tiny --init $(TEACHER) \
		--batch-size 4 --lr 1e-3 --schedule cosine --warmup-steps 100 --max-steps 1000 --epochs 10 --workers 1 \
		--out $(DEMO)/runs --name $* $(LOSSES) $(if $(wildcard $(DEMO)/runs/$*/checkpoints),--resume)
	touch $@

$(DEMO)/detections.png: $(addsuffix /finished,$(RUNS))
	$(BIN)/python -m student_train picture $(TEACHER) $(DEMO)/runs/plain/best.safetensors \
		$(DEMO)/runs/distilled/best.safetensors --data $(DEMO)/data --sizes 128 --out $@

clean:
	rm -rf .venv .venv-oldest build
