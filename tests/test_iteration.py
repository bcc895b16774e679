# SPDX-License-Identifier: MIT
"""An iteration joins its parts as it should: a run's figures are computed again by the parts that are tested alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from ppo_mpi_base import learner as learner_module
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.normalize import RewardNormalizer
from ppo_mpi_base.policies import Gaussian
from ppo_mpi_base.ppo import ppo_losses
from ppo_mpi_base.reports import is_column
from ppo_mpi_base.rollout import Rollout, explained_variance, gae
from ppo_mpi_base.worker import Worker
from tests.scripted import ScriptedEnv
from tests.test_checkpoint import half
from tests.test_checkpoint import train as train_on
from tests.test_ppo import collected, trained, working
from tests.test_worker import Shared, column, rows, train


class Look(Hooks):
    """Calls a function with each rollout, and keeps the last."""

    def __init__(self, look: Callable[[Worker, Rollout], None] = lambda worker, rollout: None) -> None:
        self.look = look

    def on_rollout(self, worker: Worker, rollout: Rollout) -> None:
        self.rollout = rollout
        self.look(worker, rollout)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_values_are_those_of_what_was_acted_on_and_of_where_it_led(tmp_path: Path, shared: bool) -> None:
    def look(worker: Worker, rollout: Rollout) -> None:
        actor_critic, finals = worker.actor_critic, worker.storage.final_observations
        assert len(finals) == int(rollout.truncated.sum()) > 0

        def values(observations: Tensor) -> Tensor:
            return actor_critic.value(observations.flatten(0, 1)).view(16, 2)

        following = values(rollout.next_observations)
        for place, final in finals.items():
            following[place] = actor_critic.value(torch.as_tensor(final[None]))[0]
        torch.testing.assert_close(rollout.values, values(rollout.observations))
        alive = ~rollout.terminated
        torch.testing.assert_close(rollout.next_values[alive], following[alive])
        policy = actor_critic.policy(rollout.observations.flatten(0, 1))
        log_probs = policy.log_prob(rollout.actions.flatten(0, 1))
        torch.testing.assert_close(rollout.log_probs.flatten(), log_probs)

    networks = {"network_fn": Shared, "value_network_fn": None} if shared else {}
    env_fn = partial(ScriptedEnv, end=lambda g, episode: ("truncated", "terminated")[episode % 2])
    train(tmp_path, env_fn=env_fn, use_vectorized_envs=True, num_environments=2, seed=1, hooks=[Look(look)], **networks)


@pytest.mark.parametrize("standardize", [True, False])
def test_advantages_and_targets_are_those_of_gamma_and_lambda(tmp_path: Path, standardize: bool) -> None:
    class Check(Look):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            advantages, returns = gae(self.rollout, gamma=0.9, lam=0.5)
            standardized = (advantages - advantages.mean()) / advantages.std(correction=0)
            torch.testing.assert_close(self.rollout.returns, returns)
            torch.testing.assert_close(self.rollout.advantages, standardized if standardize else advantages)
            explained = explained_variance(self.rollout.values, returns, Communicator())
            assert statistics["explained_variance"] == explained

    train(tmp_path, gamma=0.9, lam=0.5, standardize_advantages=standardize, hooks=[Check()])


def test_rewards_are_normalized_by_the_returns_of_whole_episodes(tmp_path: Path) -> None:
    normalizer = RewardNormalizer(1, gamma=0.5)

    def look(worker: Worker, rollout: Rollout) -> None:
        storage = worker.storage
        expected = normalizer.normalize(storage.rewards, storage.terminated | storage.truncated, Communicator())
        np.testing.assert_allclose(rollout.rewards.numpy(), expected, rtol=1e-5)

    env_fn = partial(ScriptedEnv, reward=lambda g, episode, step: float(step))
    train(tmp_path, env_fn=env_fn, normalize_rewards=True, gamma=0.5, lam=0.7, hooks=[Look(look)])


@pytest.mark.parametrize(("reward", "learned"), [(0.5, 1.0), (-3.0, -1.0), (0.0, 0.0)])
def test_clipped_rewards_are_signs(tmp_path: Path, reward: float, learned: float) -> None:
    look = Look()
    train(tmp_path, env_fn=partial(ScriptedEnv, reward=reward), clip_rewards=True, hooks=[look])
    assert (look.rollout.rewards == learned).all()


def test_noise_orders_and_weights_are_others_in_each_iteration_and_by_each_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, orders, weights = set(), [], set()

    def ordered(*given: Any) -> np.ndarray:
        orders.append(minibatch_order(*given))
        return orders[-1]

    @torch.no_grad()
    def look(worker: Worker, rollout: Rollout) -> None:
        policy = worker.actor_critic.policy(rollout.observations.flatten(0, 1))
        assert isinstance(policy, Gaussian)
        noise.add((rollout.actions.flatten(0, 1) - policy.mean).numpy().round(4).tobytes())
        weights.add(worker.flat.data.numpy().tobytes())

    minibatch_order = learner_module.minibatch_order  # type: ignore[attr-defined]
    monkeypatch.setattr(learner_module, "minibatch_order", ordered)
    for seed in (1, 2):
        train(tmp_path, seed=seed, pi_lr=0.0, vf_lr=0.0, train_pi_epochs=1, train_v_epochs=1, hooks=[Look(look)])
    assert len(noise) == len({order.tobytes() for order in orders}) == 2 * 4
    assert len(weights) == 2


def test_what_adam_gets_is_clipped_by_each_networks_limit(tmp_path: Path) -> None:
    with working(tmp_path, pi_grad_clip=0.01, v_grad_clip=0.02, adam_epsilon=0.125) as worker:
        trained(worker, collected(worker))
        assert worker.flat.norm("policy") == pytest.approx(0.01, rel=1e-4)
        assert worker.flat.norm("value") == pytest.approx(0.02, rel=1e-4)
        assert worker.learner.optimizer.epsilon == 0.125


def test_logged_norms_are_those_of_the_gradients_before_clipping(tmp_path: Path) -> None:
    class Check(Hooks):
        def on_iteration(self, worker: Worker, statistics: dict[str, float]) -> None:
            for name in ("policy", "value"):
                # One update an iteration, without a limit: the gradient is still there.
                norm = worker.flat.gradient[worker.flat.slices[name]].norm().item()
                assert statistics[f"gradient_norm_{name}"] == pytest.approx(norm, rel=1e-5)

    once: dict[str, Any] = {"train_pi_epochs": 1, "train_v_epochs": 1, "seed": 3}
    train(tmp_path / "free", pi_grad_clip=None, v_grad_clip=None, hooks=[Check()], **once)
    train(tmp_path / "clipped", pi_grad_clip=1e-3, v_grad_clip=1e-3, **once)
    for name in ("gradient_norm_policy", "gradient_norm_value"):
        assert column(tmp_path / "clipped", name)[0] == column(tmp_path / "free", name)[0] > 1e-3


def test_networks_are_initialized_orthogonally_if_so_asked(tmp_path: Path) -> None:
    with working(tmp_path, orthogonal_init=True) as worker:
        networks = worker.actor_critic.network, worker.actor_critic.value_network
        for network, gain in zip(networks, (0.01, 1.0), strict=True):
            assert isinstance(network, torch.nn.Sequential)
            singular = torch.linalg.svdvals(network[-1].weight.detach())
            torch.testing.assert_close(singular, torch.full_like(singular, gain))


@pytest.mark.parametrize(("kl", "steps"), [(0.0149, 1), (0.0151, 0)])
def test_the_policy_stops_above_one_and_a_half_times_the_target(tmp_path: Path, kl: float, steps: int) -> None:
    def reporting(*given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, statistics = ppo_losses(*given)
        return losses, {**statistics, "kl": torch.full_like(statistics["kl"], kl)}

    with working(tmp_path, loss_fn=reporting, target_kl=0.01) as worker:
        trained(worker, collected(worker))
        assert worker.learner.optimizer.steps.tolist() == [steps, 1]


def test_logged_statistics_are_means_over_the_last_epoch(tmp_path: Path) -> None:
    def counting(*given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        losses, statistics = ppo_losses(*given)
        return losses, {**statistics, "samples": torch.tensor(float(len(given[1].advantages)))}

    train(tmp_path, loss_fn=counting, train_batch_size=6)  # of 16 samples: 6, 6 and 4
    assert column(tmp_path, "samples") == pytest.approx([16 / 3] * 4)


def test_speed_and_time_go_on_where_a_run_was_stopped(tmp_path: Path) -> None:
    for steps in (64, 128):
        train(tmp_path, total_steps=steps, resume="auto", checkpoint_seconds=0)
    found = rows(tmp_path)
    assert len(found) == 8
    for k in (1, 2, 3, 5, 6, 7):
        assert found[k]["fps"] * (found[k]["seconds"] - found[k - 1]["seconds"]) == pytest.approx(16, rel=1e-3)
    assert found[4]["seconds"] > found[3]["seconds"]
    assert found[4]["fps"] < 3 * 16 / (found[4]["seconds"] - found[3]["seconds"])


def test_the_columns_that_no_statistic_may_hide_are_all_others(tmp_path: Path) -> None:
    train(tmp_path, evaluate_every=16, evaluate_episodes=1, external_update_callback=lambda: 1.0)
    taken = {name for name in rows(tmp_path)[-1] if not is_column(name)}
    assert taken == {"policy_loss", "value_loss", "kl", "clip_fraction", "entropy"}


def test_evaluations_play_in_the_environment_of_training(tmp_path: Path) -> None:
    train(
        tmp_path,
        env_kwargs={"horizon": 9, "reward": 2.0},
        max_ep_len=4,
        state_processing_hook=lambda observation: observation[:2] / 10,
        obs_space_override=Box(-9, 9, (2,), np.float32),
        evaluate_every=64,
        evaluate_episodes=2,
    )
    last = rows(tmp_path)[-1]
    assert last["evaluation_length"] == 4 and last["evaluation_return"] == 8


def test_returns_of_episodes_that_a_resumed_run_has_lost_begin_at_0(tmp_path: Path) -> None:
    own: dict[str, Any] = {"env_kwargs": {}, "max_ep_len": None, "stagger_episodes": None}
    half(tmp_path, env_fn=partial(ScriptedEnv, horizon=1000), **own)
    returns = []

    def look(worker: Worker, rollout: Rollout) -> None:
        returns.append(worker.reward_normalizer.returns.copy())

    train_on(tmp_path, env_fn=partial(ScriptedEnv, horizon=1000, reward=0.0), hooks=[Look(look)], **own)
    assert returns and not np.any(returns)
