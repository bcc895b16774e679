# SPDX-License-Identifier: MIT
"""Presets: all ranks together have the same environments, rollouts and minibatches, however many they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_mpi_base import presets
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.networks import mlp

PRESETS = [(presets.mujoco, 32, 4096, 256), (presets.mujoco_paper, 16, 2048, 64), (presets.atari, 8, 1024, 128)]


@pytest.mark.parametrize(("preset", "environments", "samples", "minibatch"), PRESETS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_a_preset_is_shared_out(
    preset: Callable[[int], dict[str, Any]], environments: int, samples: int, minibatch: int, ranks: int
) -> None:
    own = preset(ranks)
    assert own["num_environments"] * ranks == max(environments, ranks)
    assert own["num_environments"] * own["rollout_length_per_worker"] * ranks == samples
    assert own["train_batch_size"] * ranks == minibatch


@pytest.mark.parametrize("preset", [presets.mujoco, presets.mujoco_paper, presets.atari, presets.discrete])
@pytest.mark.parametrize("ranks", range(1, 25))
def test_no_update_is_made_of_a_small_rest(preset: Callable[[int], dict[str, Any]], ranks: int) -> None:
    own = preset(ranks)
    rest = own["num_environments"] * own["rollout_length_per_worker"] % own["train_batch_size"]
    assert rest == 0 or rest >= own["train_batch_size"] / 2


def test_atari_has_the_coefficients_that_codes_share() -> None:
    names = ("clip_ratio", "value_coef", "train_pi_epochs")  # the paper has 1 and 3 for the last two
    assert [presets.atari(1)[name] for name in names] == [0.1, 0.5, 4]


@pytest.mark.parametrize("ranks", [0, "2", 2.0])
def test_a_number_of_ranks_that_is_none_is_told(ranks: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"ranks={ranks!r} must be a whole number of at least 1")):
        presets.mujoco(ranks)


@given(st.integers(1, 5000))
def test_a_preset_is_valid_on_any_number_of_ranks(ranks: int) -> None:
    for preset, *_ in PRESETS:
        Config(total_steps=1, env_fn=mlp, network_fn=mlp, **preset(ranks))  # type: ignore[arg-type]
