# SPDX-License-Identifier: MIT
#
#   make train     train HalfCheetah on two ranks (make train RANKS=8)
#   make test      run all tests
#   make lint      check style; make format puts it right
#   make type      check types
#   make bench     measure speed
#
# Each sets up .venv by itself the first time, and again only after pyproject.toml or constraints.txt has changed.
# Needs Python >= 3.11 with venv (Debian: apt install python3-venv); no MPI library and no compiler.
#
# On Linux, pip's default torch is the CUDA build of several GB. A machine without a GPU wants the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make train

PYTHON ?= python3
RANKS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup train test lint format type bench

setup: $(STAMP)

# pip is looked for, not python: where venv was missing, a failed first try leaves a .venv without pip.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]' -c constraints.txt
	@touch $@

train: $(STAMP)
	$(BIN)/mpiexec -n $(RANKS) $(BIN)/python examples/mujoco/train.py

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

type: $(STAMP)
	$(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py
