# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization as a base for research: `ppo_mpi_base.ppo` has the algorithm."""
