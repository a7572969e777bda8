# Everything runs in .venv/, which the first target that needs it builds.
#
#   make serve [MODEL=folder|hub id|file.gguf] [PORT=8000] [ARGS="--api-key ..."]
#   make test | lint | type | fmt | bench | clean
#
# PYTHON=...       another interpreter than the one found (3.11 or newer)
# TORCH_INDEX=...  where torch comes from, e.g. https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help venv serve test lint type fmt bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
NATIVE := $(wildcard models/kernels/native/cpp/*) models/kernels/native/sources.py
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

venv: $(STAMP)

# Kept apart from $(STAMP): a changed source or requirement does not rebuild the environment.
$(BIN)/python:
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
	echo "==> creating $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "proa: '$$found -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMP): $(BIN)/python pyproject.toml setup.py serve/version.py $(NATIVE)
	@echo "==> installing $(TORCH) (the largest download)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "==> building the kernels and installing proa with its requirements"
	@$(PIP) install -e ".[dev]"
	@touch $@
	@echo "==> $(VENV) is ready"

# The demo model comes with its example adapter.
serve: $(STAMP)
	@exec $(BIN)/proa serve $(if $(MODEL),"$(MODEL)",--adapter roleplay=examples/roleplay/adapter) $(if $(PORT),--port "$(PORT)") $(ARGS)

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
	rm -rf $(VENV) build dist *.egg-info models/kernels/native/_native.so
