# SPDX-License-Identifier: MIT
"""Compiled gradients equal eager ones, notice what changes, and give way with one line where they cannot compile."""

from __future__ import annotations

import shutil
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from ppo_mpi_base.compilation import Compiler, Eager, choose_compiler
from ppo_mpi_base.config import Config
from ppo_mpi_base.errors import ConfigurationError
from ppo_mpi_base.flat_parameters import Adam, FlatParameters, clip_scale
from ppo_mpi_base.gradients import Gradients, Objective, checked_names, origins_of_terms
from ppo_mpi_base.hooks import Hooks
from ppo_mpi_base.networks import FlattenPixels, Scaled, SharedTrunk, SpaceToDepthConv2d, mlp
from ppo_mpi_base.policies import ActorCritic, action_dim, action_noise, observation_dim
from ppo_mpi_base.ppo import ppo_losses
from ppo_mpi_base.rollout import Batch

NOBODY: frozenset[str] = frozenset()
STATISTICS = 8
BOX = Box(-np.inf, np.inf, (3,), np.float32)
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++")


def coefficients(**more: float) -> dict[str, Tensor]:
    named = {"clip_ratio": 0.2, "entropy_coef": 0.01, "value_coef": 0.5, **more}
    return {name: torch.tensor(x) for name, x in named.items()}


def cnn(obs_dim: int, out_dim: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(obs_dim, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, out_dim))


def eager(objective: Objective, flat: FlatParameters) -> Gradients:
    return Gradients(objective, flat, Eager())


def parts(
    network_fn: Any, observations: gymnasium.Space, actions: gymnasium.Space, loss_fn: Any = ppo_losses, hooks: Any = ()
) -> tuple[Objective, FlatParameters]:
    """Return an objective and its flat parameters, with the same weights each time."""
    torch.manual_seed(0)
    n = observation_dim(observations)
    actor_critic = ActorCritic(network_fn(n, action_dim(actions)), network_fn(n), observations, actions)
    return Objective(actor_critic, loss_fn, hooks), FlatParameters(actor_critic.parameter_slices(), STATISTICS)


def batches_of(observations: gymnasium.Space, actions: gymnasium.Space, count: int, size: int = 16) -> list[Batch]:
    """Return random minibatches."""
    random, made = np.random.default_rng(0), []
    for _ in range(count):
        acted = random.integers(0, actions.n, size) if isinstance(actions, Discrete) else random.normal(size=(size, 2))
        seen = random.uniform(0, 255, (size, *(observations.shape or ())))
        columns = [torch.as_tensor(random.normal(size=size), dtype=torch.float32) for _ in range(4)]
        made.append(
            Batch(
                torch.as_tensor((seen / 255 if observations.dtype.kind == "f" else seen).astype(observations.dtype)),  # type: ignore[union-attr]
                torch.as_tensor(acted, dtype=torch.int64 if isinstance(actions, Discrete) else torch.float32),
                columns[0] - 3,
                *columns[1:],
                extras={},
            )
        )
    return made


class Weighted(Hooks):
    """Adds a loss, weighted by a number of its own."""

    weight = 0.0

    def on_losses(self, actor_critic: ActorCritic, batch: Batch, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**losses, "small": self.weight * actor_critic.value(batch.observations).square().mean()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_a_compiler)])
def test_gradients_of_each_update_are_autograds(compiled: bool) -> None:
    objective, flat = parts(mlp, BOX, Box(-1, 1, (2,)))
    first, second = batches_of(BOX, Box(-1, 1, (2,)), 2)
    gradients = Gradients(objective, flat, Compiler(pytest.fail) if compiled else Eager())
    for batches in ((first, second), (second, first), (first,)):
        wanted, numbers = torch.zeros_like(flat.gradient), torch.zeros(STATISTICS)
        for batch, weight in zip(batches, (0.25, 0.75), strict=False):
            gradients.add(batch, coefficients(), NOBODY, weight, first=batch is batches[0])
            losses, statistics = ppo_losses(objective.actor_critic, batch, coefficients())
            found = torch.autograd.grad(losses["policy"] + losses["value"], flat.parameters())
            wanted += weight * torch.cat([g.flatten() for g in found])
            numbers[:5] += weight * torch.stack([*losses.values(), *statistics.values()]).detach()
        torch.testing.assert_close(flat.gradient, wanted)
        torch.testing.assert_close(flat.statistics, numbers)
    assert flat.attached()
    assert list(objective.terms(first, coefficients())[1])[:2] == ["policy_loss", "value_loss"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_a_compiler)])
def test_idle_losses_are_reported_but_train_nothing(compiled: bool) -> None:
    objective, flat = parts(mlp, BOX, Discrete(3))
    (batch,) = batches_of(BOX, Discrete(3), 1)
    gradients = Gradients(objective, flat, Compiler(pytest.fail) if compiled else Eager())
    gradients.add(batch, coefficients(), NOBODY, 1.0, first=True)
    gradients.add(batch, coefficients(), frozenset({"policy"}), 1.0, first=True)
    assert not flat.gradient[flat.slices["policy"]].any() and flat.gradient[flat.slices["value"]].any()
    assert flat.statistics[:5].all()


@needs_a_compiler
def test_compiled_gradients_and_statistics_have_the_weight_of_their_minibatch() -> None:
    (batch,), messages = batches_of(BOX, Discrete(3), 1), []
    for compiler in (Eager(), Compiler(pytest.fail)):
        objective, flat = parts(mlp, BOX, Discrete(3))
        Gradients(objective, flat, compiler).add(batch, coefficients(), NOBODY, 0.25)
        messages.append(flat.message)
    torch.testing.assert_close(*messages, rtol=1e-4, atol=1e-6)


def calls_of(layer: nn.Module) -> list[str]:
    """Return a list that gets a word at each call of a layer from now on."""
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("called"))
    return calls


@needs_a_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_what_other_ranks_train_is_left_out(compiled: bool) -> None:
    (batch,), (objective, flat) = batches_of(BOX, Discrete(3), 1), parts(mlp, BOX, Discrete(3))
    eager(objective, flat).add(batch, coefficients(), NOBODY, 0.5)
    whole, names = flat.message.clone(), list(objective.terms(batch, coefficients())[1])
    for other, terms in (("value", {"value_loss"}), ("policy", {"policy_loss", "kl", "clip_fraction", "entropy"})):
        objective, flat = parts(mlp, BOX, Discrete(3))
        gradients = Gradients(objective, flat, Compiler(pytest.fail) if compiled else Eager())
        gradients.leave_to_others(frozenset({other}), frozenset(terms))
        left = objective.actor_critic.network if other == "policy" else objective.actor_critic.value_network
        calls = [] if compiled else calls_of(left[1])
        gradients.add(batch, coefficients(), NOBODY, 0.5)
        assert not calls
        expected = whole.clone()
        expected[flat.slices[other]] = 0
        expected[[len(flat.data) + names.index(name) for name in terms]] = 0
        torch.testing.assert_close(flat.message, expected, rtol=1e-4, atol=1e-6)
        assert left(torch.ones(1, 3)).any(), "the network is as before, for hooks and evaluations"


def test_losses_that_train_parameters_of_the_users_own_are_not_divided() -> None:
    mine = nn.Parameter(torch.ones(()))

    def loss_fn(actor_critic: ActorCritic, batch: Batch, coefficients: dict[str, Tensor]) -> Any:
        losses, statistics = ppo_losses(actor_critic, batch, coefficients)
        return {**losses, "policy": mine.exp() * losses["policy"]}, statistics

    (batch,), (objective, _) = batches_of(BOX, Discrete(3), 1), parts(mlp, BOX, Discrete(3), loss_fn)
    with pytest.raises(ConfigurationError, match="they train parameters that belong to neither network"):
        origins_of_terms(objective, batch, coefficients())


def test_each_loss_and_statistic_is_followed_to_its_network() -> None:
    (batch,), (objective, _) = batches_of(BOX, Discrete(3), 1), parts(mlp, BOX, Discrete(3))
    for clipped in ({}, {"value_clip_ratio": 0.2}):
        policy, value = frozenset({"policy"}), frozenset({"value"})
        assert origins_of_terms(objective, batch, coefficients(**clipped)) == {
            "policy_loss": policy,
            "value_loss": value,
            "kl": policy,
            "clip_fraction": policy,
            "entropy": policy,
        }


@needs_a_compiler
@pytest.mark.parametrize("stride", [2, 4])
def test_compiled_equals_eager_in_bfloat16(stride: int) -> None:
    """A rollout's log-probabilities come from the eager networks: the ratio is 1 for the compiled losses too."""
    images, told, found = Box(0, 255, (1, 8, 8), np.uint8), [], []
    (batch,) = batches_of(images, Discrete(3), 1)
    for compiler in (Eager(), Compiler(told.append)):
        torch.manual_seed(0)
        trunk = nn.Sequential(Scaled(1 / 255), SpaceToDepthConv2d(1, 4, 2 * stride, stride), nn.ReLU(), FlattenPixels())
        features = 4 * (8 // stride - 1) ** 2
        network = SharedTrunk(trunk, nn.Linear(features, 3), nn.Linear(features, 1))
        actor_critic = ActorCritic(network, None, images, Discrete(3), precision="bfloat16")
        objective = Objective(actor_critic, ppo_losses, [])
        flat = FlatParameters(actor_critic.parameter_slices(), STATISTICS)
        with torch.no_grad():
            log_probs = actor_critic.policy(batch.observations).log_prob(batch.actions)
        Gradients(objective, flat, compiler).add(batch._replace(log_probs=log_probs), coefficients(), NOBODY, 1.0)
        found.append(flat.gradient.clone())
        kl = flat.statistics[list(objective.terms(batch, coefficients())[1]).index("kl")]
        assert 0 <= kl < 1e-5
    assert not told
    eager_gradient, compiled_gradient = found
    assert (compiled_gradient - eager_gradient).norm() < 0.02 * eager_gradient.norm()


@pytest.mark.parametrize("compiler", [Eager(), pytest.param(Compiler(print), marks=needs_a_compiler)], ids=type)
def test_weights_that_are_cast_once_a_rollout_act_as_those_that_autocast_casts(compiler: Eager) -> None:
    torch.manual_seed(0)
    images = Box(0, 255, (2, 12, 12), np.uint8)
    trunk = nn.Sequential(SpaceToDepthConv2d(2, 4, 4, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(100), nn.Linear(100, 9))
    network = SharedTrunk(trunk, nn.Linear(9, 3), nn.Linear(9, 1))
    actor_critic = ActorCritic(network, None, images, Discrete(3), precision="bfloat16")
    flat = FlatParameters(actor_critic.parameter_slices(), STATISTICS)
    gradients = Gradients(Objective(actor_critic, ppo_losses, []), flat, compiler)
    seen = torch.randint(0, 256, (5, *images.shape), dtype=torch.uint8)
    noise = torch.as_tensor(action_noise(Discrete(3), np.random.default_rng(0), 5), dtype=torch.float32)
    numbers, chosen = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    acted = chosen, chosen.clone(), numbers, numbers.clone()
    for _ in range(2):
        gradients.begin_rollout()
        with torch.no_grad():
            wanted = actor_critic.act_and_evaluate(seen, noise)
            gradients.act(seen, noise, acted)
            torch.testing.assert_close(acted, wanted, rtol=2**-7, atol=2**-7)
            flat.data.mul_(-1.5)  # as an update: the next rollout acts by it
    gradients.act(seen, noise, acted)
    assert not torch.allclose(acted[3], actor_critic.value(seen), rtol=0.1)


@needs_a_compiler
@pytest.mark.parametrize(
    ("network_fn", "observations", "actions"),
    [(mlp, BOX, Box(-1, 1, (2,))), (cnn, Box(0, 255, (1, 6, 6), np.uint8), Discrete(3))],
    ids=["MLP, Gaussian", "CNN, categorical"],
)
def test_compiled_equals_eager_after_20_updates(
    network_fn: Any, observations: gymnasium.Space, actions: gymnasium.Space
) -> None:
    if network_fn is cnn:  # bytes up to 255 would make the loss too steep to compare
        network_fn = lambda n, m=1: nn.Sequential(nn.AvgPool2d(1, divisor_override=255), cnn(n, m))  # noqa: E731
    results, told = [], []
    batches = batches_of(observations, actions, 20)
    for compiler in (Eager(), Compiler(told.append)):
        objective, flat = parts(network_fn, observations, actions)
        gradients = Gradients(objective, flat, compiler)
        adam, statistics = Adam(flat), []
        for k, batch in enumerate(batches):
            if k % 5 == 0:
                compiler.check_again()
            flat.message.zero_()
            # The clip ratio falls, as in training: a tensor, so that nothing is compiled anew.
            gradients.add(batch, coefficients(clip_ratio=0.2 - 0.005 * k), NOBODY, 1.0)
            # The policy rests now and then: another set of slices moves.
            moved = ("value",) if k % 4 == 3 else ("policy", "value")
            adam.step(dict.fromkeys(moved, 1e-3), {name: clip_scale(flat.norm(name), 1.0) for name in moved})
            statistics.append(flat.statistics.clone())
        assert flat.attached()
        seen = batches[0].observations[:5]
        noise = torch.as_tensor(action_noise(actions, np.random.default_rng(0), 5), dtype=torch.float32)
        acted = torch.zeros_like(noise), torch.zeros_like(noise)
        if network_fn is mlp:
            gradients.act(seen, noise, acted)
        results.append((flat.data, torch.stack(statistics), acted))
    assert told == []
    (wanted, wanted_statistics, wanted_acted), (found, found_statistics, found_acted) = results
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_statistics, wanted_statistics, rtol=1e-4, atol=1e-5)
    for a, b in zip(found_acted, wanted_acted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# Numbers that a loss or a network reads from outside. The second one's name holds that of a tensor of the package.
strength = 1.0
inflation = 1.0


class Tempered(nn.Linear):
    """A network that reads a number of its own."""

    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class Numbers:
    """A loss that reads numbers from everywhere, and what it takes to change each."""

    def __init__(self) -> None:
        self.own = {"factor": 1.0}
        self.hook = Weighted()
        self.objective, self.flat = parts(lambda n, m=1: Tempered(n, m), BOX, Discrete(2), self, [self.hook])
        (self.batch,) = batches_of(BOX, Discrete(2), 1, size=4)

    def __call__(self, actor_critic: ActorCritic, batch: Batch, _: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value = actor_critic.value(batch.observations).mean() * strength * inflation * self.own["factor"]
        return {"value": value}, {}

    def change(self, what: str, to: float) -> None:
        if what in ("strength", "inflation"):
            globals()[what] = to
        elif what == "own":
            self.own["factor"] = to
        elif what == "hook":
            self.hook.weight = to
        else:
            self.objective.actor_critic.value_network.temperature = to  # type: ignore[union-attr,assignment]

    def message(self, gradients: Gradients) -> Tensor:
        self.flat.message.zero_()
        gradients.add(self.batch, {}, NOBODY, 1.0)
        return self.flat.message.clone()


@pytest.fixture(scope="module")
def compiled_numbers() -> tuple[Numbers, Gradients, Compiler]:
    numbers, compiler = Numbers(), Compiler(lambda line: pytest.fail(line))
    gradients = Gradients(numbers.objective, numbers.flat, compiler)
    for _ in range(2):
        numbers.message(gradients)
    return numbers, gradients, compiler


@needs_a_compiler
@pytest.mark.parametrize("what", ["strength", "inflation", "own", "hook", "temperature"])
def test_a_number_from_outside_that_changes_is_noticed_in_the_next_iteration(what: str, compiled_numbers: Any) -> None:
    numbers, gradients, compiler = compiled_numbers
    before = 0.0 if what == "hook" else 1.0
    numbers.change(what, 2.0)
    compiler.check_again()
    try:
        if what == "strength":  # compiled anew in earnest; for the others it is enough that it would be
            wanted = numbers.message(eager(numbers.objective, numbers.flat))
            torch.testing.assert_close(numbers.message(gradients), wanted)
            return
        (addition,) = gradients._additions.values()
        torch.compiler.set_stance("fail_on_recompile")
        with torch.no_grad(), pytest.raises(RuntimeError, match="recompile"):
            addition._checked(*numbers.flat.parts, numbers.flat.data, *numbers.batch[:-1])  # type: ignore[attr-defined]
    finally:
        torch.compiler.set_stance("default")
        numbers.change(what, before)
        compiler.check_again()


@needs_a_compiler
def test_a_number_that_changes_too_often_ends_in_one_line_not_in_an_error() -> None:
    # A weight that a hook lowers in each iteration: torch stops compiling anew after some times.
    numbers, told = Numbers(), []  # type: ignore[var-annotated]
    compiler = Compiler(told.append)
    gradients = Gradients(numbers.objective, numbers.flat, compiler)
    with torch._dynamo.config.patch(recompile_limit=1):
        for weight in (0.0, 0.5, 0.7):
            numbers.change("hook", weight)
            compiler.check_again()
            wanted = numbers.message(eager(numbers.objective, numbers.flat))
            torch.testing.assert_close(numbers.message(gradients), wanted)
    assert len(told) == 1 and "\n" not in told[0]


class Counting:
    """A loss that counts its calls, and depends on their number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, actor_critic: ActorCritic, batch: Batch, _: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.calls += 1
        return {"value": actor_critic.value(batch.observations).mean() * self.calls}, {}


@needs_a_compiler
def test_a_loss_that_counts_its_calls_is_called_each_time() -> None:
    (batch,) = batches_of(BOX, Discrete(2), 1, size=4)
    messages = []
    for compiler in (Eager(), Compiler(lambda line: None)):
        loss = Counting()
        objective, flat = parts(mlp, BOX, Discrete(2), loss)
        gradients = Gradients(objective, flat, compiler)
        with torch._dynamo.config.patch(recompile_limit=2):
            for _ in range(5):
                gradients.add(batch, {}, NOBODY, 1.0)
        assert loss.calls == 5
        messages.append(flat.message)
    torch.testing.assert_close(*messages)


class Alternating(Counting):
    """A loss that depends on whether its calls were odd or even."""

    def __call__(self, actor_critic: ActorCritic, batch: Batch, _: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.calls = (self.calls + 1) % 2
        return {"value": actor_critic.value(batch.observations).mean() * (1 + self.calls)}, {}


@needs_a_compiler
def test_a_loss_that_alternates_is_the_one_whose_turn_it_is() -> None:
    (batch,) = batches_of(BOX, Discrete(2), 1, size=4)
    messages: list[list[Tensor]] = []
    for compiler in (Eager(), Compiler(lambda line: None)):
        objective, flat = parts(mlp, BOX, Discrete(2), Alternating())
        gradients = Gradients(objective, flat, compiler)
        messages.append([])
        for call in range(9):
            if call == 7:
                compiler.check_again()  # the next iteration begins
            flat.message.zero_()
            gradients.add(batch, {}, NOBODY, 1.0)
            messages[-1].append(flat.message.clone())
    for eagerly, compiled in zip(*messages, strict=True):
        torch.testing.assert_close(eagerly, compiled)


def untraceable(actor_critic: ActorCritic, batch: Batch, named: dict[str, Tensor]) -> Any:
    losses, statistics = ppo_losses(actor_critic, batch, named)
    if float(losses["value"].detach()) > 1e9:  # leaves the graph
        print("never")
    return losses, statistics


@needs_a_compiler
def test_a_loss_that_cannot_be_traced_runs_as_written_after_one_line() -> None:
    told: list[str] = []
    batches = batches_of(BOX, Discrete(3), 3)
    objective, flat = parts(mlp, BOX, Discrete(3), untraceable)
    twin, twin_flat = parts(mlp, BOX, Discrete(3), untraceable)
    compiled, as_written = Gradients(objective, flat, Compiler(told.append)), eager(twin, twin_flat)
    for k, batch in enumerate(batches):
        compiled.add(batch, coefficients(), NOBODY, 0.5, first=k == 0)
        as_written.add(batch, coefficients(), NOBODY, 0.5, first=k == 0)
    # All three, the first one included, once each; and one line for both functions, that for the first and the other.
    torch.testing.assert_close(flat.message, twin_flat.message)
    assert len(told) == 1 and told[0].startswith("compile: the losses run uncompiled (") and "\n" not in told[0]
    assert flat.attached()


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (lambda a, b, c: a.value(b.observations).mean(), r"two dicts of scalar tensors, .*, not Tensor"),
        (lambda a, b, c: ({"l2": c["l2"]}, {}), r"loss_fn reads 'l2', .* are clip_ratio, .*loss_coefficients=\{'l2'"),
        (lambda a, b, c: ({"value": a.value(b.observations)}, {}), r"'value_loss' must be a scalar .* shape \(16,\)"),
        (
            lambda a, b, c: ({"value": a.value(b.observations).sum()}, {"mine": torch.zeros((), device="meta")}),
            "'mine' must be on cpu, as the minibatch is, not meta",
        ),
        (lambda a, b, c: ({"value": 1.0}, {}), r"'value_loss' must be a scalar tensor, but has type float"),
        (
            lambda a, b, c: ({"value": a.value(b.observations).mean().detach()}, {}),
            r"the loss 'value' depends on no",
        ),
        (lambda a, b, c: ({}, {}), r"the loss \(there is none\) depends"),
        (lambda a, b, c: ({"value": a.value(b.observations).mean()}, {}), r"target_kl=0.1 needs .* 'kl'"),
        *(
            (lambda a, b, c, name=name: ({"value": (v := a.value(b.observations).mean())}, {"kl": v, name: v}), told)
            for name in ("value_loss", "episode_return", "time_mine")
            for told in [f"the statistic '{name}' would hide a column of the logs"]
        ),
    ],
    ids=[
        "one scalar",
        "unknown coefficient",
        "not a scalar",
        "on another device",
        "not a tensor",
        "detached",
        "no loss",
        "no kl",
        "a loss's name",
        "the score's name",
        "a time's name",
    ],
)
def test_a_loss_function_that_cannot_be_used_is_told_before_anything_is_learned(loss_fn: Any, told: str) -> None:
    objective, _ = parts(mlp, BOX, Discrete(2), loss_fn)
    (batch,) = batches_of(BOX, Discrete(2), 1)
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp, target_kl=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=told):
        checked_names(objective, batch, coefficients(), config)


def chosen(observations: gymnasium.Space = BOX, **keywords: Any) -> tuple[Eager, list[str]]:
    told: list[str] = []
    given: dict[str, Any] = {"total_steps": 1000, "env_fn": mlp, "network_fn": mlp, **keywords}
    return choose_compiler(Config(**given), observations, torch.device("cpu"), 1, told.append), told


LONG = {"total_steps": 1e7, "train_batch_size": 64}  # 20,000 iterations of 40 x 8 minibatches


@needs_a_compiler
def test_compiling_is_left_to_those_who_train_long_enough() -> None:
    for keywords, kind in (
        ({"compile": False, **LONG}, Eager),
        ({}, Eager),
        (LONG, Compiler),
        ({**LONG, "train_pi_epochs": 0, "train_v_epochs": 0}, Eager),
        ({"compile": True}, Compiler),
        ({**LONG, "total_steps": 1e6, "train_pi_epochs": 1, "value_network_fn": mlp}, Compiler),
        ({**LONG, "total_steps": 1e6, "train_pi_epochs": 1}, Eager),  # those of a value network count for nothing
    ):
        compiler, told = chosen(**keywords)
        assert type(compiler) is kind and told == []
    few = {"total_steps": 1e4, "train_batch_size": 64}
    kinds = [type(chosen(observations, **few)[0]) for observations in (BOX, Box(0, 255, (4, 84, 84), np.uint8))]
    assert kinds == [Eager, Compiler], "a minibatch of images takes many times as long"


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler, told = chosen(compile=True)
    assert type(compiler) is Eager and len(told) == 1 and "no C++ compiler" in told[0]
    assert chosen(compile=False)[1] == [], "nobody asked"


@needs_a_compiler
def test_tensors_that_share_memory_are_not_handed_to_the_graph_as_they_are() -> None:
    def act(part: Tensor, whole: Tensor) -> None:
        part.add_(1)
        whole.mul_(2)

    compiled = Compiler(lambda line: None)(act, "it runs")
    found, wanted = torch.arange(6.0), torch.arange(6.0)
    for _ in range(4):
        compiled(found[2:4], found)
        act(wanted[2:4], wanted)
        torch.testing.assert_close(found, wanted)


class LeavesAutocast(nn.Module):
    """Computes its head in float32, as the layers of a user's may."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        with torch.autocast("cpu", enabled=False):
            output = self.head(features.float())
        return output[:, :3], output[:, 3:]


def test_a_network_that_leaves_autocast_acts_by_its_own_weights() -> None:
    torch.manual_seed(0)
    actor_critic = ActorCritic(LeavesAutocast(), None, BOX, Discrete(3), precision="bfloat16")
    flat, state = FlatParameters(actor_critic.parameter_slices(), STATISTICS), torch.get_rng_state()
    gradients = Gradients(Objective(actor_critic, ppo_losses, []), flat, Eager())
    assert torch.equal(torch.get_rng_state(), state)
    seen, noise, numbers, chosen = (
        torch.randn(5, 3),
        torch.rand(5, 3),
        torch.zeros(5),
        torch.zeros(5, dtype=torch.int64),
    )
    acted = chosen, chosen.clone(), numbers, numbers.clone()
    gradients.begin_rollout()
    gradients.act(seen, noise, acted)
    with torch.no_grad():
        torch.testing.assert_close(acted, actor_critic.act_and_evaluate(seen, noise))


def test_losses_by_other_names_than_at_first_are_refused() -> None:
    """Their places in the message would be those of others, and the KL stop would look at a wrong number."""
    objective, flat = parts(mlp, BOX, Discrete(3))
    (batch,) = batches_of(BOX, Discrete(3), 1)
    config = Config(total_steps=1, env_fn=mlp, network_fn=mlp)  # type: ignore[arg-type]
    _, objective.known = checked_names(objective, batch, coefficients(), config)
    gradients = eager(objective, flat)
    gradients.add(batch, coefficients(), NOBODY, 1.0)
    objective.hooks.append(Weighted())
    with pytest.raises(ConfigurationError, match="value_loss, kl.* at first, and are .*small_loss.* now"):
        gradients.add(batch, coefficients(), NOBODY, 1.0)


def test_batch_normalization_acts_in_bfloat16() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    actor_critic = ActorCritic(network, mlp(3), BOX, Discrete(3), precision="bfloat16")
    flat = FlatParameters(actor_critic.parameter_slices(), STATISTICS)
    gradients = Gradients(Objective(actor_critic, ppo_losses, []), flat, Eager())
    assert network[1].num_batches_tracked == 0
    gradients.begin_rollout()
    chosen = torch.zeros(5, dtype=torch.int64)
    gradients.act(torch.randn(5, 3), torch.rand(5, 3), (chosen, chosen.clone()))
