# make             set up .venv and run the main job: convert, prove and measure the bundled tiny Step-3.7 model
# make test        set up and pass the tests
# make serve-env   set up .venv-serve with vLLM for the CPU (3.5 GB), which `make` then serves the release with
# make bench       the README's speeds, measured on this machine (not llm-compressor's: benchmarks/convert_peers.py); vLLM's where `make serve-env` was run
# make clean       remove all results, releases among them
# make help        these lines
# The released torch wheel brings CUDA along; TORCH="torch==2.13.0 --index-url URL" takes another build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
CORES ?= all
# tests in several processes, each with torch (1 GB); one after the other where they start vLLM, which takes all cores
PARALLEL ?= $(if $(wildcard .venv-serve),,-n logical --maxprocesses 4 --dist worksteal)
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

run: setup
	@snakemake --cores $(CORES) --quiet progress rules host reason
	@echo "up to date: results/step37_tiny/mxfp4_experts/release and report.html beside it"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"mxforge needs Python 3.11 or later, {sys.executable} is {v.major}.{v.minor}; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

test: setup
	@$(BIN)/python -m pytest $(PARALLEL)

bench: setup
	@for script in quantize_cpu hash_cpu convert_cpu workflow_cpu $$(test -d .venv-serve && echo serve_cpu); do \
	  echo "== benchmarks/$$script.py"; $(BIN)/python benchmarks/$$script.py || exit 1; done

serve-env: setup
	@TORCH="$(TORCH)" $(BIN)/python -m stages.serving.environment

help:
	@sed -n 's/^# //p; /^PYTHON/q' Makefile

clean:
	rm -rf results/*/ .snakemake

.PHONY: run setup test bench serve-env clean help
