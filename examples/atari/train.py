# SPDX-License-Identifier: MIT
"""Train an Atari agent: `mpiexec -n 2 python examples/atari/train.py --env-id ALE/Breakout-v5`."""

import argparse

from ppo_mpi_base import presets
from ppo_mpi_base.atari import atari_env, atari_vector_env
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import shared_impala_cnn, shared_nature_cnn
from ppo_mpi_base.ppo import PPO

NETWORKS = {"nature": shared_nature_cnn, "impala": shared_impala_cnn}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", default="ALE/Pong-v5")
    parser.add_argument("--total-steps", type=float, default=1e7)
    parser.add_argument("--network", choices=NETWORKS, default="nature")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    parser.add_argument("--plain", action="store_true", help="games by Gymnasium's wrappers: slower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/atari")
    arguments = parser.parse_args()

    PPO(
        total_steps=arguments.total_steps,
        env_fn=atari_env,
        make_vec_env_fn=None if arguments.plain else atari_vector_env,
        env_kwargs={"env_id": arguments.env_id},
        network_fn=NETWORKS[arguments.network],
        precision=arguments.precision,
        seed=arguments.seed,
        log_directory=f"{arguments.directory}/logs",
        save_location=f"{arguments.directory}/saved_model",
        **presets.atari(world().size),
    )
