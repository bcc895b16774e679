# SPDX-License-Identifier: MIT
"""Every hyperparameter of `PPO()`: its name, default, meaning, range and check."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium
import torch

from ppo_mpi_base.checks import (
    Count,
    CountOrZero,
    Finite,
    Fraction,
    NonNegative,
    Positive,
    check_device,
    checked,
)
from ppo_mpi_base.errors import ConfigurationError, check_takes, did_you_mean
from ppo_mpi_base.hooks import Hooks

COEFFICIENTS = ("clip_ratio", "entropy_coef", "value_coef", "value_clip_ratio")
"""Keywords that loss functions read by name, besides those of `loss_coefficients`."""
TAKES = {
    "loss_fn": ("actor_critic", "batch", "coefficients"),
    "advantage_fn": ("rollout", "gamma", "lam"),
    "external_update_callback": (),
    "rollout_interception_callback": ("steps",),
    "state_processing_hook": ("observation",),
}
"""Keywords that are user functions -> the arguments that these get."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All keywords of `PPO()`, in the usual terms: T steps, N environments per rank, R ranks.

    Raises:
        ConfigurationError: a value has the wrong type or is out of range; the message names both.
    """

    total_steps: Count
    """Agent steps to train for, over all ranks and environments (never emulator frames). Iterations are not cut short,
    so the last one may exceed this."""
    env_fn: Callable[..., gymnasium.Env]
    """Builds one environment, with all wrappers: `env_fn(**env_kwargs)`."""
    network_fn: Callable[..., torch.nn.Module]
    """Builds the policy network, observations -> means or logits: `network_fn(obs_dim, act_dim, **policy_kwargs)`. For
    a Dict space, `obs_dim` is a dict, and observations are dicts of tensors."""
    value_network_fn: Callable[..., torch.nn.Module] | None = None
    """Builds the value network, observations -> (B, 1) or (B,): `value_network_fn(obs_dim, **critic_kwargs)`. None: the
    policy network returns both, as a tuple (means or logits, values), and is trained as one network."""

    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords for `env_fn`."""
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords for `network_fn`."""
    critic_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords for `value_network_fn`."""

    seed: CountOrZero = 0
    """All random numbers derive from it: networks, environments, action noise and minibatch order."""
    rollout_length_per_worker: Count = 512
    """T: steps of each environment per iteration. Usual: 32 to 2048."""
    use_vectorized_envs: bool = False
    """Step `num_environments` environments per rank, with batched forward passes, instead of a single one."""
    num_environments: Count | None = None
    """N: environments per rank; needs `use_vectorized_envs=True`."""
    make_vec_env_fn: Callable[..., gymnasium.vector.VectorEnv] | None = None
    """Builds a Gymnasium vector environment: `make_vec_env_fn(env_fn, n, **env_kwargs)`. None: a plain loop over N
    environments in this process, which is fastest for light physics."""
    max_ep_len: Count | None = None
    """Truncate episodes after this many steps, in addition to the environment's own limit. If each lost life of a game
    ends an episode, steps count from the last lost life."""
    stagger_episodes: Count | None = None
    """Cut each environment's first episode, at lengths spread evenly up to this one over all ranks' environments, so
    that rollouts cover all stages of long episodes (of 1,000 steps, say). None: all environments begin together."""
    clip_rewards: bool = False
    """Learn from the sign of the reward; reports still show true rewards."""
    normalize_observations: bool = False
    """Normalize observations by their running moments over all ranks, and clip them to 10 standard deviations."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return over all ranks; clip to [-10, 10]."""
    delay_training_for_steps: CountOrZero = 0
    """Collect this many steps (over all ranks) before the first update of the networks."""

    gamma: Fraction = 0.99
    """Discount factor. Usual: 0.98 to 0.999."""
    lam: Fraction = 0.95
    """Lambda of generalized advantage estimation. Usual: 0.9 to 0.98."""
    standardize_advantages: bool = True
    """Shift and scale the advantages of a rollout to mean 0 and standard deviation 1 over all ranks."""
    clip_ratio: Positive = 0.2
    """Epsilon of the clipped surrogate objective: ratios further than this from 1 bring no gain. Usual: 0.1 to 0.3."""
    value_clip_ratio: Positive | None = None
    """Clip the change of the value prediction too (in units of returns). None: off, which learns equally well."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus. Usual: 0 for MuJoCo, 0.01 for Atari."""
    value_coef: Positive = 1.0
    """Weight of the value loss; matters if policy and value share parameters. Usual then: 0.5."""
    pi_lr: NonNegative = 3e-4
    """Learning rate of the policy (and of a network for both)."""
    vf_lr: NonNegative = 1e-3
    """Learning rate of the value network."""
    anneal_lr: bool = False
    """Anneal both learning rates linearly to 0 over `total_steps`."""
    anneal_clip_ratio: bool = False
    """Anneal `clip_ratio` linearly to 0 over `total_steps` (the paper's Atari setting)."""
    anneal_entropy_coef: bool = False
    """Anneal `entropy_coef` linearly to 0 over `total_steps`: explore first, exploit at the end."""
    adam_epsilon: Positive = 1e-8
    """Epsilon of Adam. PPO implementations often use 1e-5."""
    train_batch_size: Count | None = None
    """B: minibatch size per rank; an update averages over R*B samples. The last minibatch of an epoch has what is left.
    None: the whole rollout."""
    train_pi_epochs: CountOrZero = 40
    """Policy epochs (passes over the rollout) per iteration. Usual: 3 to 10 with minibatches, 40 to 80 without."""
    train_v_epochs: CountOrZero = 40
    """Value function epochs (passes over the rollout) per iteration."""
    grad_accum: Count = 1
    """Minibatches whose gradients are averaged for one update."""
    pi_grad_clip: Positive | None = 1.0
    """Clip the policy's gradient, averaged over ranks, to this norm. None: no limit."""
    v_grad_clip: Positive | None = 1.0
    """Clip the value function's gradient, averaged over ranks, to this norm. None: no limit."""
    target_kl: NonNegative = 0.0
    """Stop the policy's updates in an iteration before the first one whose KL estimate exceeds 1.5 times this. 0: off.
    Usual: 0.01 to 0.05."""

    orthogonal_init: bool = False
    """Initialize layers orthogonally with gain sqrt(2); the policy's last one with 0.01, the value's last with 1. One
    network for both must then be a `networks.SharedTrunk`."""
    initial_log_std: Finite = 0.0
    """Initial log standard deviation of the Gaussian policy, in units of the action: if bounds are far from -1 and 1,
    wrap the environment in `gymnasium.wrappers.RescaleAction`. Not used if the network chooses its distribution."""

    loss_fn: Callable[..., Any] | None = None
    """Your own objective instead of `ppo.ppo_losses`: `loss_fn(actor_critic, batch, coefficients)` returns two dicts
    of scalar tensors, losses and statistics."""
    loss_coefficients: dict[str, float] = field(default_factory=dict)
    """More numbers that your `loss_fn` reads by name; hooks may change them between updates."""
    advantage_fn: Callable[..., Any] | None = None
    """Your own advantage estimate instead of `rollout.gae`: `advantage_fn(rollout, gamma, lam)` returns advantages and
    value targets, a tensor (T, N) each."""
    hooks: Sequence[Hooks] = ()
    """Instances of subclasses of `hooks.Hooks`, whose methods run at set points in training."""
    external_update_callback: Callable[[], float | None] | None = None
    """Called between rollout and update; its return value is logged as `external_loss`."""
    rollout_interception_callback: Callable[[list], list] | None = None
    """Called for each episode, or its part in this rollout: gets its steps as a list of `(obs, action, reward, value,
    logp)`, and returns as many."""
    state_processing_hook: Callable[[Any], Any] | None = None
    """Transforms each observation before it is stored and acted on."""
    obs_space_override: gymnasium.Space | None = None
    """The observation space after `state_processing_hook`."""

    evaluate_every: Count | None = None
    """Agent steps between evaluations. Each plays `evaluate_episodes` episodes with the most probable actions, in
    separate environments from `env_fn`, and does not affect training. None: no evaluations."""
    evaluate_episodes: Count = 10
    """Episodes per evaluation, divided among ranks; always from the same initial states."""

    device: str | torch.device | None = None
    """Device of the networks and rollouts. None: the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which networks multiply and convolve; parameters, distributions, losses and Adam stay in float32.
    "bfloat16" is faster for convolutions if the processor has instructions for it (AVX512-BF16, AMX); if not, it is
    much slower."""
    compile: Literal["auto", True, False] = "auto"
    """Compile losses with their gradients, and the policy's forward pass, with `torch.compile`. "auto": if the run is
    long enough to repay it, and there is a C++ compiler."""
    divide_networks: Literal["auto", True, False] = "auto"
    """Let half of the ranks train the policy and half the value network, if these are separate, each on the samples of
    two ranks: the same updates with half as many calls. "auto": if that is faster, and losses and hooks allow it."""
    log_directory: str = "./logs/"
    """Directory for TensorBoard's file, progress.csv and the learning curve."""
    save_location: str | None = "./saved_model/"
    """Directory for the latest and the best networks, and checkpoints. None: save nothing."""
    resume: Literal["auto", False] = False
    """"auto": continue from the newest complete checkpoint in `save_location`; without one, begin anew."""
    checkpoint_seconds: NonNegative = 60.0
    """Seconds between checkpoints; 0 writes one after each iteration."""
    max_seconds: Positive | None = None
    """Stop after this time, with a checkpoint and exit status 75, as on a signal (SIGTERM, SIGINT, SIGUSR1)."""
    stop_deadline: Positive = 30.0
    """Seconds from a signal within which the run ends, if necessary at the last checkpoint."""
    stall_seconds: Positive | None = 1800.0
    """Seconds that ranks wait in a collective for a missing rank before they name it and end the run. None: no
    limit."""
    quiet: bool = False
    """Print no progress, only failures."""

    def __post_init__(self) -> None:
        """Check each value against its annotation, then the values against each other."""
        hints = typing.get_type_hints(Config, include_extras=True)
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, checked(item.name, getattr(self, item.name), hints[item.name]))
        if self.num_environments is not None and not self.use_vectorized_envs:
            raise ConfigurationError(
                f"num_environments={self.num_environments} needs use_vectorized_envs=True: "
                "without it, each rank steps one"
            )
        if self.use_vectorized_envs and self.num_environments is None:
            raise ConfigurationError("use_vectorized_envs=True needs num_environments, the number per rank, such as 8")
        if self.make_vec_env_fn is not None and not self.use_vectorized_envs:
            raise ConfigurationError("make_vec_env_fn needs use_vectorized_envs=True and num_environments")
        if self.obs_space_override is not None and self.state_processing_hook is None:
            raise ConfigurationError(
                "obs_space_override describes what state_processing_hook returns, but that hook is missing"
            )
        for name, arguments in TAKES.items():
            if (function := getattr(self, name)) is not None:
                check_takes(name, function, *arguments)
        if self.resume == "auto" and self.save_location is None:
            raise ConfigurationError('resume="auto" needs save_location, the directory of the checkpoints')
        if self.delay_training_for_steps >= self.total_steps:
            raise ConfigurationError(
                f"delay_training_for_steps={self.delay_training_for_steps} must be below "
                f"total_steps={self.total_steps}: nothing would be learned"
            )
        check_device(self.device)
        for name, value in self.loss_coefficients.items():
            checked(f"loss_coefficients[{name!r}]", value, Finite)
            if name in COEFFICIENTS:
                checked(f"loss_coefficients[{name!r}]", value, hints[name])
            elif self.loss_fn is None and not self.hooks:
                raise ConfigurationError(
                    f"loss_coefficients[{name!r}]: nothing reads it without a loss_fn{did_you_mean(name, COEFFICIENTS)}"
                )
        samples = self.samples_per_rank
        if self.minibatch_size > samples:
            raise ConfigurationError(
                f"train_batch_size={self.train_batch_size} is larger than a rank's rollout of {samples} samples "
                f"({self.rollout_length_per_worker} steps x {self.environments_per_rank} environments): "
                f"choose at most {samples}"
            )

    @property
    def environments_per_rank(self) -> int:
        """N."""
        return self.num_environments or 1

    @property
    def samples_per_rank(self) -> int:
        """T*N, per iteration."""
        return self.rollout_length_per_worker * self.environments_per_rank

    @property
    def minibatch_size(self) -> int:
        """B, in samples per rank."""
        return self.train_batch_size or self.samples_per_rank

    @property
    def coefficients(self) -> dict[str, float]:
        """The numbers that a loss function reads by name, at the start of training."""
        own = {name: getattr(self, name) for name in COEFFICIENTS}
        given = {name: value for name, value in own.items() if value is not None}
        return {name: float(value) for name, value in {**given, **self.loss_coefficients}.items()}
