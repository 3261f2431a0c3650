# Everything runs in .venv, in this folder. A fresh machine needs python3 (>= 3.11, with venv) and make.
PYTHON ?= python3
# Installed first, and only when .venv has no torch: the newest torch would bring gigabytes of CUDA
# packages to a machine without a GPU. Choose another with, for example,
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   make demo TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
EXTRAS ?= dev
PYTEST_ARGS ?= -n 2
DEMO_IMAGE ?= $(firstword $(sort $(wildcard src/st3/assets/samples/*.png)))
DEMO_PROMPT ?= describe the image in detail.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench bench-gpu docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@echo "==> making $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## answer about a real image, untrimmed and with ST3, and draw what was kept
	$(BIN)/st3 generate $(DEMO_IMAGE) -p "$(DEMO_PROMPT)" --compare --heatmap demo.png

# One thread in each of the test processes: two threads in each would fight over two cores.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff correct what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For example BENCH_ARGS=--quick (a quarter of an hour) or BENCH_ARGS="--sections prefill idle".
BENCH_ARGS ?=

bench: $(STAMP) ## the CPU table: prefill, decode, captions against the untrimmed model (hours)
	$(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

# Needs no .venv: any Python with torch, transformers, typer and rich on a machine with a GPU.
PART ?=
OUT ?= benchmarks/results

bench-gpu: ## one part of the GPU table, PART=1 ...; without PART the list of them
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(if $(PART),--part $(PART)) --out "$(OUT)" $(BENCH_ARGS)

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/python -c "import mkdocs, material" 2>/dev/null || $(BIN)/python -m pip install -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove builds, caches and the environment
	rm -rf $(VENV) build dist site demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
