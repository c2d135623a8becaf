# Everything runs from one virtual environment, which is filled once and again only when a version changes.
# `make VENV=/some/folder test` keeps it elsewhere; `make PYTHON=python3.12 test` starts from another Python.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
PACKAGES := launcher strategies deploy

# DeepSpeed compiles its operators when they are first used, and finds ninja by name.
export PATH := $(BIN):$(PATH)

.PHONY: help install quickstart test lint types check coverage matrix kill-matrix planner-matrix fuzz testbed test-cluster test-trackers docs clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

install: $(STAMP)  ## fill the virtual environment

# torch goes first and alone, at its pinned version: a resolver that is free to choose fetches gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PYTHONWARNINGS=ignore DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs,example,lora,dev]'
	@touch $@

quickstart: $(STAMP)  ## train the example job
	$(BIN)/memlaunch run examples/reviews/job.json

test: $(STAMP)  ## the tests, less the long ones
	$(BIN)/pytest

lint: $(STAMP)  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) | $(PACKAGES:%=.typing/memlaunch/%)  ## mypy, strict
	$(BIN)/mypy

# The packages lie at the root but are installed below one name; mypy finds them there by these links.
.typing/memlaunch/%:
	@mkdir -p $(@D)
	ln -sfn ../../$* $@

check: lint types test  ## all of these

coverage: $(STAMP)  ## the tests, with the lines they miss, worker processes included
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

matrix: $(STAMP)  ## the whole equivalence matrix, of which `make test` runs a sample
	$(BIN)/pytest -m long

kill-matrix: $(STAMP)  ## everything that can be killed, at random steps; most of an hour, as root
	$(BIN)/pytest -m hours -rP tests/test_kill_matrix.py tests/cluster/test_node_cut.py

planner-matrix: $(STAMP)  ## the planner's choice against an exhaustive search; most of an hour
	$(BIN)/pytest -m hours tests/test_plan_search.py

fuzz: $(STAMP)  ## all mutated job files and hostfiles, of which `make test` tries a sample
	$(BIN)/pytest -m hours -rP tests/test_fuzz.py

testbed:  ## the Debian packages that a test cluster needs; as root
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends slurm-wlm munge openmpi-bin pdsh openssh-server iproute2

test-cluster: $(STAMP)  ## the tests on a real two-node cluster of this machine; as root
	$(BIN)/pytest -m "cluster and not hours" tests/cluster

# Not into the environment: DeepSpeed imports MLflow where there is one, which costs every rank a second.
build/trackers: constraints.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --upgrade --target $@ -c constraints.txt wandb mlflow-skinny
	@touch $@

test-trackers: $(STAMP) build/trackers  ## the tests on Weights & Biases and MLflow
	PYTHONPATH=build/trackers MEMLAUNCH_REQUIRE_TRACKERS=1 $(BIN)/pytest tests/test_trackers.py

docs: $(STAMP)  ## the documentation, into build/docs; what is generated in it is written again
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet

clean:  ## remove what the targets made, less the run folders
	rm -rf $(VENV) .typing .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov build
	rm -rf *.egg-info
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
