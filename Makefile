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
STAMP := $(VENV)/.installed-$(EXTRAS)
# Versions of all packages but torch and what only torch needs; `make lock` writes them anew.
LOCK := requirements/dev.lock
DOCS_LOCK := requirements/docs.lock
OLDEST := requirements/oldest.lock
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call venv,FOLDER) makes an environment, also in place of one that was left half-made.
venv = $(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
# $(call torch,FOLDER,WHAT) gives it a torch when it has none.
torch = $(1)/bin/python -c "import torch" 2>/dev/null || $(1)/bin/python -m pip install $(2)
# $(call pytest,FOLDER): one thread in each of the test processes, as two threads in each would fight
# over two cores.
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-latest test-oldest test-vllm lint format bench bench-vllm bench-gpu docs lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The stamp is written last: what broke off half-way is done again. Extras that the lock does not cover
# (EXTRAS=dev,ray) get their newest versions that fit it.
$(STAMP): pyproject.toml $(LOCK)
	@echo "==> making $(VENV) (a few minutes the first time)"
	@rm -f $@
	$(call venv,$(VENV))
	$(call torch,$(VENV),$(TORCH))
	$(BIN)/python -m pip install -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(LOCK) -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip check
	@touch $@

demo: $(STAMP) ## answer about a real image, untrimmed and with ST3, and draw what was kept
	$(BIN)/st3 generate $(DEMO_IMAGE) -p "$(DEMO_PROMPT)" --compare --heatmap demo.png

test: $(STAMP) ## run the tests
	$(call pytest,$(VENV)) $(PYTEST_ARGS)

test-quick: $(STAMP) ## a part of the tests, in about a minute
	$(call pytest,$(VENV)) --quick $(PYTEST_ARGS)

# The newest of everything, above the caps in pyproject.toml, too, in an environment that is made anew
# each time; and the tests that watch upstream. For torch without CUDA, or transformers' main:
#   make test-latest TORCH_LATEST="torch --index-url https://download.pytorch.org/whl/cpu"
#   make test-latest TRANSFORMERS_LATEST="git+https://github.com/huggingface/transformers"
TORCH_LATEST ?= torch
TRANSFORMERS_LATEST ?= transformers
LATEST := .venv-latest

test-latest: ## run all tests, with those that watch upstream, on the newest releases
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install $(TORCH_LATEST)
	$(LATEST)/bin/python requirements/uncapped.py > $(LATEST)/uncapped.txt
	$(LATEST)/bin/python -m pip install -r $(LATEST)/uncapped.txt $(TRANSFORMERS_LATEST)
	$(LATEST)/bin/python -m pip install --no-deps --no-build-isolation -e .
	$(LATEST)/bin/python -m pip list
	$(call pytest,$(LATEST)) --upstream $(PYTEST_ARGS)

# The oldest version of everything that pyproject.toml names. On a machine that has another torch at
# hand and not this one: make test-oldest TORCH_OLDEST=torch==2.13.0
TORCH_OLDEST ?= torch==2.11.0
OLD := .venv-oldest

$(OLD)/.installed: pyproject.toml $(OLDEST)
	@rm -f $@
	$(call venv,$(OLD))
	$(call torch,$(OLD),$(TORCH_OLDEST))
	$(OLD)/bin/python -m pip install -r $(OLDEST)
	$(OLD)/bin/python -m pip install --no-deps --no-build-isolation -e .
	$(OLD)/bin/python -m pip check
	@touch $@

test-oldest: $(OLD)/.installed ## run the tests on the oldest versions that are supported (Python 3.11)
	$(call pytest,$(OLD)) $(PYTEST_ARGS)

# vLLM wants a transformers of its own: it is tested in an environment of its own.
VLLM := .venv-vllm
VLLM_LOCK := requirements/vllm.lock

$(VLLM)/.installed: pyproject.toml $(VLLM_LOCK) tests/vllm/cpu_torchvision.py
	@rm -f $@
	$(call venv,$(VLLM))
	$(call torch,$(VLLM),torch==2.13.0)
	$(VLLM)/bin/python -m pip install --no-deps -r $(VLLM_LOCK)
	$(VLLM)/bin/python tests/vllm/cpu_torchvision.py
	$(VLLM)/bin/python -m pip install --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/.installed ## run the tests of the plug-in for vLLM (Python 3.11 or newer, x86-64)
	$(call pytest,$(VLLM)) tests/vllm

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

bench-vllm: $(VLLM)/.installed ## vLLM with st3 and without, and beside st3 serve
	$(VLLM)/bin/python benchmarks/vllm_capacity.py $(BENCH_ARGS)
	$(VLLM)/bin/python benchmarks/vllm_vs_serve.py $(BENCH_ARGS)

# Needs no .venv: any Python with torch, transformers, typer and rich on a machine with a GPU.
PART ?=
OUT ?= benchmarks/results

bench-gpu: ## one part of the GPU table, PART=1 ...; without PART the list of them
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(if $(PART),--part $(PART)) --out "$(OUT)" $(BENCH_ARGS)

$(VENV)/.docs: $(STAMP) $(DOCS_LOCK)
	$(BIN)/python -m pip install -r $(DOCS_LOCK)
	@touch $@

docs: $(VENV)/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Renews all versions. Only what a change of pyproject.toml asks for: make lock LOCK_ARGS=
# uv is pinned for a stable layout of the files. It reads torch's requirements without listing them.
UV ?= uv==0.13.9
LOCK_ARGS ?= --upgrade
LOCKER := .venv-lock
COMPILE = $(LOCKER)/bin/uv pip compile --quiet --no-config pyproject.toml --python-version 3.11 --universal \
	--fork-strategy fewest --no-emit-package torch --excludes requirements/torch-only.txt \
	--constraint $(LOCKER)/torch.txt --constraint requirements/lock-constraints.txt \
	--custom-compile-command "make lock"

lock: ## choose the versions in requirements/ anew (see CONTRIBUTING.md)
	$(call venv,$(LOCKER))
	$(LOCKER)/bin/python -m pip install --quiet $(UV)
	@echo "$(firstword $(TORCH))" > $(LOCKER)/torch.txt
	$(COMPILE) $(LOCK_ARGS) --extra dev -o $(LOCK)
	$(COMPILE) $(LOCK_ARGS) --extra docs --constraint $(LOCK) -o $(DOCS_LOCK)
	$(COMPILE) $(LOCK_ARGS) --extra dev --resolution lowest-direct -o $(OLDEST)

clean: ## remove builds, caches and the environments
	rm -rf $(VENV) $(LATEST) $(OLD) $(VLLM) $(LOCKER)
	rm -rf build dist site demo.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
