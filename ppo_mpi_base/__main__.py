# SPDX-License-Identifier: MIT
"""Run the command `ppo-mpi` as `python -m ppo_mpi_base`."""

from ppo_mpi_base.cli import command

command()
