# SPDX-License-Identifier: MIT
"""Ranks that train one network each make the updates that all of them together would make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mpi.launch import launch

# 8 environments on R ranks, 128 samples an iteration. All in float64, where two ways to add up differ by 1e-16.
SCRIPT = """
import sys

import gymnasium
import numpy as np
import torch

from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import world
from ppo_mpi_base.networks import mlp
from ppo_mpi_base.policies import Gaussian
from ppo_mpi_base.ppo import PPO, ppo_losses

ranks, directory = world(), sys.argv[1]
torch.set_default_dtype(torch.float64)
CLOCKS = ("time_", "fps", "seconds", "slowest_rank")


class Recorder(Hooks):
    def __init__(self):
        self.rows = []

    def on_rollout(self, worker, rollout):
        rollout.extras["positive"] = rollout.rewards > 0
        rollout.extras["halves"] = rollout.rewards.to(torch.bfloat16)[..., None].expand(-1, -1, 3)

    def on_start(self, worker):
        step = worker.learner.step

        def looked_at(found):
            for name in worker.learner.division.idle:
                assert not worker.flat.gradient[worker.flat.slices[name]].any(), "others' gradients are summed up here"
            step(found)

        worker.learner.step = looked_at

    def on_iteration(self, worker, statistics):
        self.division = type(worker.learner.division).__name__
        additions = worker.learner.gradients._additions.values()
        self.fell_back = [addition for addition in additions if getattr(addition, "_failed", False)]
        adam = worker.learner.optimizer
        arrays = [worker.flat.data, worker.flat.gradient, adam.first_moment, adam.second_moment]
        self.state = [x.numpy().copy() for x in arrays] + [adam.steps.copy()]
        first, *others = ranks.gather_all([x.tobytes() for x in self.state])
        assert all(other == first for other in others), "ranks differ"
        self.rows.append({name: x for name, x in statistics.items() if not name.startswith(CLOCKS)})


def swapped_names(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    values = actor_critic.value(batch.observations)
    further = {"mean_value": values.mean(), "positive": batch.extras["positive"].to(values.dtype).mean()}
    further["size"] = actor_critic.network[1].weight.square().sum()
    bonus = (batch.extras["halves"].to(values.dtype)[:, 0] * values).mean()
    return {"value": losses["policy"], "policy": losses["value"], "bonus": bonus}, {**statistics, **further}


def of_both(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    critic = (batch.returns - actor_critic.value(batch.observations)).detach()
    weighted = -(actor_critic.policy(batch.observations).log_prob(batch.actions) * critic).mean()
    return {**losses, "policy": weighted}, statistics


def policy_alone(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    values = actor_critic.value(batch.observations)
    return {"policy": losses["policy"]}, {"kl": statistics["kl"], "mean_value": values.mean()}


class StateDependent(torch.nn.Module):
    # Chooses its distribution, and has more outputs than actions.
    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.network = mlp(obs_dim, 2 * act_dim)

    def forward(self, seen):
        return self.network(seen)

    def distribution(self, outputs):
        return Gaussian(*outputs.chunk(2, -1))


class Looks(Hooks):
    def on_update(self, worker, statistics):
        assert statistics.keys() >= {"policy_loss", "value_loss", "kl"}


def train(divide, env_id="Pendulum-v1", further=(), **keywords):
    recorder = Recorder()
    given = {
        "network_fn": mlp,
        "total_steps": 128 * 3,
        "use_vectorized_envs": True,
        "num_environments": 8 // ranks.size if 8 % ranks.size == 0 else 1,
        "rollout_length_per_worker": 16,
        "train_batch_size": 32 // ranks.size,
        "train_pi_epochs": 3,
        "train_v_epochs": 3,
        "max_ep_len": 15,
        "normalize_observations": True,
        "entropy_coef": 0.01,
        "pi_lr": 3e-3,
        "pi_grad_clip": 0.1,
        "compile": False,
        "log_directory": directory + "/logs",
        "save_location": None,
        "quiet": True,
        **keywords,
    }
    PPO(env_fn=lambda: gymnasium.make(env_id), value_network_fn=mlp, divide_networks=divide,
        hooks=[recorder, *further], **given)
    return recorder


def same(one, other):
    assert one.rows[0].keys() == other.rows[0].keys()
    pairs = [(a[name], b[name]) for a, b in zip(one.rows, other.rows, strict=True) for name in a]
    pairs += zip(one.state, other.state, strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def same_divided_or_not(divide=True, **keywords):
    undivided, divided = train(False, **keywords), train(divide, **keywords)
    assert (undivided.division, divided.division) == ("Undivided", "Divided")
    assert not undivided.fell_back and not divided.fell_back
    same(undivided, divided)


"""

CASES = {
    "Gaussian": "same_divided_or_not()",
    "categorical": 'same_divided_or_not(env_id="CartPole-v1")',
    "minibatches of unequal size": "same_divided_or_not(train_batch_size=24 // ranks.size)",
    "several minibatches an update": "same_divided_or_not(grad_accum=3)",
    "the whole rollout": "same_divided_or_not(train_batch_size=None)",
    "clipped values": "same_divided_or_not(value_clip_ratio=0.1)",
    "no training yet": "same_divided_or_not(delay_training_for_steps=128)",
    "compiled": "same_divided_or_not(compile=True)",
    "a distribution of one's own": "same_divided_or_not(network_fn=StateDependent)",
    "a loss of one's own": "same_divided_or_not(loss_fn=swapped_names)",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4])
def test_divided_or_not_ranks_make_the_same_updates(tmp_path: Path, ranks: int) -> None:
    cases = list(CASES.values())
    few = cases if ranks == 2 else [CASES["Gaussian"], CASES["compiled"]]  # more ranks than cores are slow
    done = launch("\n".join([SCRIPT, *few]), ranks, str(tmp_path), timeout=280)
    assert done.code == 0, done.stderr


CANNOT = {
    "loss_fn=of_both": "computed from both: policy_loss",
    "loss_fn=policy_alone": "one of them has no loss",
    "target_kl=0.1": "the policy's updates and the value's may end at different points",
    "further=[Looks()]": "a hook's on_update gets the statistics of both",
    "train_v_epochs=4": "the policy's updates and the value's may end at different points",
}


@pytest.mark.timeout(120)
def test_where_networks_cannot_be_divided_one_line_says_why(tmp_path: Path) -> None:
    each = [
        f"one, other = train(False, {keywords}), train(True, quiet=False, {keywords})\n"
        'same(one, other)\nassert other.division == "Undivided"'
        for keywords in CANNOT
    ]
    each.append('train("auto", train_pi_epochs=0, train_v_epochs=0)')  # nothing to divide
    done = launch("\n".join([SCRIPT, *each]), 2, str(tmp_path), timeout=100)
    assert done.code == 0, done.stderr
    said = re.findall(r"divide_networks: all ranks train both networks \((.*?)\)", " ".join(done.stdout.split()))
    assert said == list(CANNOT.values())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("which", ["policy", "value"])
def test_a_gradient_that_is_not_finite_in_one_network_ends_all(tmp_path: Path, which: str) -> None:
    script = f"""
def broken(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    return {{**losses, {which!r}: losses[{which!r}] * coefficients["factor"] ** 2}}, statistics


class Break(Hooks):
    def on_iteration(self, worker, statistics):
        worker.coefficients["factor"].fill_(1e308)


keywords = dict(loss_fn=broken, loss_coefficients={{"factor": 1.0}}, total_steps=1e6)
recorder = Recorder()
PPO(env_fn=lambda: gymnasium.make("Pendulum-v1"), network_fn=mlp, value_network_fn=mlp, divide_networks=True,
    rollout_length_per_worker=16, train_batch_size=8, train_pi_epochs=3, train_v_epochs=3, compile=False,
    log_directory=directory, save_location=None, hooks=[Break()], **keywords)
"""
    done = launch(SCRIPT + script, 2, str(tmp_path), timeout=60)
    rank = ["policy", "value"].index(which)
    assert done.code != 0
    assert f"TrainingError: gradient or loss is not finite: rank {rank}, iteration 1" in done.stderr, done.stderr
    assert done.stderr.count("TrainingError") == 1 and done.seconds < 40


@pytest.mark.timeout(120)
def test_who_made_the_last_gradient_of_an_epoch_infinite_is_named(tmp_path: Path) -> None:
    # By one sample, which is in the second of two updates, and in the next epoch's order in the first.
    script = """
class Mark(Hooks):
    def on_rollout(self, worker, rollout):
        rollout.extras["mark"] = torch.zeros_like(rollout.rewards)
        rollout.extras["mark"][1, 0] = np.inf if ranks.rank == 1 else 0.0


def broken(actor_critic, batch, coefficients):
    losses, statistics = ppo_losses(actor_critic, batch, coefficients)
    log_probs = actor_critic.policy(batch.observations).log_prob(batch.actions)
    return {**losses, "policy": losses["policy"] + (batch.extras["mark"] * log_probs).mean()}, statistics


PPO(env_fn=lambda: gymnasium.make("Pendulum-v1"), network_fn=mlp, value_network_fn=mlp, divide_networks=True,
    rollout_length_per_worker=16, train_batch_size=8, train_pi_epochs=3, train_v_epochs=3, compile=False,
    total_steps=1e3, log_directory=directory, save_location=None, loss_fn=broken, hooks=[Mark()])
"""
    done = launch(SCRIPT + script, 2, str(tmp_path), timeout=60)
    assert "TrainingError: gradient or loss is not finite: rank 0, iteration 0" in done.stderr, done.stderr
