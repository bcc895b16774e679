# SPDX-License-Identifier: MIT
"""`python -m ppo_mpi_base` is the command `ppo-mpi`."""

from ppo_mpi_base.cli import command

command()
