# First use makes .venv and installs kernbench into it; a change of pyproject.toml or constraints.txt installs again.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := build/demo
TRITON ?= 3.5.0
OTHER := build/triton-$(TRITON)

.DEFAULT_GOAL := help
.PHONY: help demo test check builds gpu-test

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: export KERNBENCH_WORKSPACE := $(DEMO)
demo: $(INSTALLED) ## profile TitanMAC, swap phase 0, check the AdamW kernel; prints the report's path last
	mkdir -p $(DEMO)
	$(BIN)/kernbench profile titan-mac --preset tiny
	$(BIN)/kernbench swap --phase 0 --rounds 15 || test $$? -eq 1
	$(BIN)/kernbench parity fused_adamw --device cpu
	@echo "report: $$(ls -d $(DEMO)/reports/titan-mac/*-swap-phase0-* | tail -1)/report.html"

test: $(INSTALLED) ## run the test suite on the CPU
	$(BIN)/python -m pytest -n 2 -q

check: $(INSTALLED) ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kernbench kernels workloads tests
	$(BIN)/lint-imports --no-logo

builds: export KERNBENCH_WORKSPACE := $(DEMO)
builds: $(INSTALLED) $(OTHER) ## build every kernel with another Triton, as in make builds TRITON=3.5.0
	mkdir -p $(DEMO)
	PYTHONPATH=$(OTHER) $(BIN)/kernbench bench --compile-only

$(OTHER):
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$(TRITON)

gpu-test: $(INSTALLED) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -v -rs

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
