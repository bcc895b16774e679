# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization as a base for research; the algorithm is in `ppo_mpi_base.ppo`."""
