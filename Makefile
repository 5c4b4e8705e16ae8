# Two commands for a newcomer: `make demo` and `make test`. The rest is for developers (`make help`).

PYTHON ?= python3
# Any torch >= 2.8 will do; this one is what the project is developed with.
TORCH ?= torch==2.13.0
# The one that torch's GPU builds bring; without a GPU it compiles and interprets the Triton kernels.
TRITON ?= triton==3.7.1
# CuTe's headers, with which layouts for Hopper are compared. What the package declares to need, nothing here does.
CUTE ?= nvidia-cutlass==4.2.0.0
# Triton of the oldest supported generation, for the compile check only.
OLD_TRITON ?= triton==3.6.0
# Tests in parallel, each process with one thread: more of them only get in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt \
	$(filter-out csrc/cuda/host/%,$(shell find cmake csrc python -type f))
HOST_SOURCES := $(SOURCES) tools/cuda_on_host $(wildcard csrc/cuda/host/*)

.PHONY: demo test slow aot gpu-dry-run lint format sanitize bench bench-quick clean help

demo: $(VENV)/demo  ## train one small network five ways, print the table, draw the figure
	$(BIN)/python -m ghl_kernels demo

test: $(VENV)/dev build/cuda-on-host/built  ## the whole test suite except the slow part
	$(PYTEST) -m "not slow"

slow: $(VENV)/dev build/triton-old build/cuda-on-host/built  ## the tests that take longer, up to an hour
	GHL_TRITON_36="$(CURDIR)/build/triton-old" $(PYTEST) -m slow

aot: $(VENV)/dev build/triton-old  ## compile every Triton kernel for every architecture, with both Triton versions
	PYTHON=$(BIN)/python tools/aot_check
	PYTHONPATH=build/triton-old PYTHON=$(BIN)/python tools/aot_check

gpu-dry-run: $(VENV)/dev build/cuda-on-host/built  ## walk through tools/gpu_check without a GPU
	$(BIN)/python tools/gpu_check --dry-run

lint: $(VENV)/dev  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/dev  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

sanitize: $(VENV)/dev  ## the kernel tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/sanitize
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/cuda_on_host --sanitize -m "not slow"
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/cuda_on_host --threads -m races

bench: $(VENV)/dev  ## the ratios that the project promises, measured here
	$(BIN)/python -m ghl_kernels bench --suite ratios

# Processors of other kinds, shared with other jobs: only what got twice as slow beside its rival is a change.
bench-quick: $(VENV)/dev  ## a few small cases beside the recorded ratios: fails where one got twice as slow
	$(BIN)/python -m ghl_kernels bench --quick --threads 2 --compare bench/results/quick/baseline.json --margin 1

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info ghl_kernels/*.so

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch first and by itself: an unpinned one brings gigabytes of GPU libraries
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	touch $@

$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --editable ".[dev]" "$(TRITON)"
	$(BIN)/pip install --quiet --no-deps "$(CUTE)"
	touch $@ $(VENV)/demo

# the CUDA kernels, compiled to run on this machine's CPU
build/cuda-on-host/built: $(VENV)/dev $(HOST_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/cuda_on_host
	touch $@

build/triton-old: $(VENV)/torch
	$(BIN)/pip install --quiet --no-deps --target $@ "$(OLD_TRITON)"
