# SPDX-License-Identifier: MIT
"""Episodes, transitions and seeds of the environments of a rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

from ppo_mpi_base.atari import LostLifeEnds
from ppo_mpi_base.envs import Environments, check_spaces
from ppo_mpi_base.errors import ConfigurationError, TrainingError
from ppo_mpi_base.seeding import EPISODES, generator
from ppo_mpi_base.steppers import Episode, first_seed
from tests.scripted import FaultyEnv, ScriptedEnv, scripted

NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED


class Sparse(SyncVectorEnv):
    """Returns of a masked reset only the observations of the environments that were reset, as EnvPool does."""

    def reset(self, *, seed=None, options=None):
        mask = None if options is None else options["reset_mask"]
        observations, infos = super().reset(seed=seed, options=options)
        return observations if mask is None else observations[mask], infos


# Every way in which N environments can come, as a function of a list of N functions that each build one.
WAYS: dict[str, Callable[[list], Any]] = {
    "list": lambda fns: [fn() for fn in fns],
    "sync, next step": partial(SyncVectorEnv, autoreset_mode=NEXT_STEP),
    "sync, same step": partial(SyncVectorEnv, autoreset_mode=SAME_STEP),
    "sync, disabled": partial(SyncVectorEnv, autoreset_mode=DISABLED),
    "sync, next step, no copy": partial(SyncVectorEnv, autoreset_mode=NEXT_STEP, copy=False),
    "sync, same step, no copy": partial(SyncVectorEnv, autoreset_mode=SAME_STEP, copy=False),
    "sparse, next step": partial(Sparse, autoreset_mode=NEXT_STEP),
    "async, next step": partial(AsyncVectorEnv, autoreset_mode=NEXT_STEP),
    "async, same step": partial(AsyncVectorEnv, autoreset_mode=SAME_STEP),
    "async, disabled": partial(AsyncVectorEnv, autoreset_mode=DISABLED),
    "async, next step, no copy": partial(AsyncVectorEnv, autoreset_mode=NEXT_STEP, copy=False),
    "async, same step, no memory shared": partial(AsyncVectorEnv, autoreset_mode=SAME_STEP, shared_memory=False),
    "async, disabled, no memory shared": partial(AsyncVectorEnv, autoreset_mode=DISABLED, shared_memory=False),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
every_sync_way = pytest.mark.parametrize(
    "way",
    [way for name, way in WAYS.items() if "async" not in name],
    ids=[name for name in WAYS if "async" not in name],
)


class Step(NamedTuple):
    """One step of one environment; arrays as bytes, so that equal means bitwise equal."""

    before: bytes
    reward: float
    terminated: bool
    truncated: bool
    after: bytes


class Played(NamedTuple):
    """What N environments did: for each its steps, and its episodes as (return, length)."""

    steps: list[list[Step]]
    episodes: list[list[tuple[float, int]]]


def play(environments: Environments, actions: np.ndarray) -> Played:
    """Step with actions (T, N, ...) through `Environments`, then close them."""
    space, n = environments.observation_space, environments.num_envs
    now, after = (np.zeros((n, *(space.shape or ())), space.dtype) for _ in range(2))
    played = Played([[] for _ in range(n)], [[] for _ in range(n)])
    environments.reset(now)
    for action in actions:
        transition = environments.step(action, after)
        assert transition.rewards.dtype == np.float64
        assert set(transition.final_observations) == set(
            np.flatnonzero(transition.terminated | transition.truncated).tolist()
        )
        for i in range(n):
            final = transition.final_observations.get(i, after[i])
            assert np.asarray(final).dtype == space.dtype
            flags = bool(transition.terminated[i]), bool(transition.truncated[i])
            played.steps[i].append(Step(now[i].tobytes(), float(transition.rewards[i]), *flags, final.tobytes()))
        for episode in transition.episodes:
            played.episodes[episode.environment].append((episode.return_, episode.length))
        now[...] = after
    environments.close()
    return played


def play_alone(fns: Sequence[Callable[[], gym.Env]], actions: np.ndarray, max_ep_len: int | None = None) -> Played:
    """Do what `play` does in the plainest way: each environment alone, from its first to its last step."""
    played = Played([], [])
    for i, fn in enumerate(fns):
        environment, steps, episodes = fn(), [], []
        before = environment.reset()[0].copy()
        rewards: list[float] = []
        for action in actions[:, i]:
            after, reward, terminated, truncated, _ = environment.step(action)
            rewards.append(float(reward))
            truncated = (truncated or len(rewards) == max_ep_len) and not terminated
            steps.append(Step(before.tobytes(), float(reward), terminated, truncated, after.tobytes()))
            if terminated or truncated:
                episodes.append((sum(rewards), len(rewards)))
                rewards = []
                after, _ = environment.reset()
            before = after.copy()
        played.steps.append(steps)
        played.episodes.append(episodes)
    return played


def box_actions(length: int, n: int, seed: int = 0) -> np.ndarray:
    """Draw actions (length, n, 2) for the action space of `ScriptedEnv`."""
    return np.random.default_rng(seed).uniform(-1, 1, (length, n, 2)).astype(np.float32)


def rank(environments: Any, seed: int = 0, first_global_index: int = 0, **kwargs: Any) -> Environments:
    return Environments(environments, seed=seed, first_global_index=first_global_index, **kwargs)


def bytes_of(*numbers: float) -> bytes:
    return np.array(numbers, dtype=np.float32).tobytes()


# Episodes of 1 to 5 steps, which end in each of the three ways; no two rewards are the same.
MIXED: dict[str, Any] = {
    "horizon": lambda g, episode: 1 + (3 * g + 2 * episode) % 5,
    "end": lambda g, episode: ("terminated", "truncated", "both")[(g + episode) % 3],
    "reward": lambda g, episode, step: 100.0 * g + episode + step / 8,
}


class TestTransitions:
    def test_by_hand(self):
        """Final observation, the one before it and the next episode's first one all differ; so do the environments."""
        environments = rank(
            [ScriptedEnv(g=0, horizon=2, end="terminated"), ScriptedEnv(g=1, horizon=3, end="truncated", reward=-0.5)]
        )
        out = np.full((2, 4), np.nan, np.float32)
        environments.reset(out)
        assert out.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
        action = np.array([[0.25, 0.5], [-1, 0]], np.float32)

        transition = environments.step(action, out)
        assert out.tolist() == [[0, 0, 1, 0.75], [1, 0, 1, -1]]
        assert transition.rewards.tolist() == [1.0, -0.5]
        assert not transition.terminated.any() and not transition.truncated.any()
        assert transition.final_observations == {} and transition.episodes == []

        transition = environments.step(action, out)
        assert out.tolist() == [[0, 1, 0, 0], [1, 0, 2, -1]]
        assert transition.terminated.tolist() == [True, False] and not transition.truncated.any()
        assert {i: x.tolist() for i, x in transition.final_observations.items()} == {0: [0, 0, 2, 0.75]}
        assert transition.episodes == [Episode(2.0, 2, 0)]

        transition = environments.step(action, out)
        assert out.tolist() == [[0, 1, 1, 0.75], [1, 1, 0, 0]]
        assert transition.truncated.tolist() == [False, True] and not transition.terminated.any()
        assert {i: x.tolist() for i, x in transition.final_observations.items()} == {1: [1, 0, 3, -1]}
        assert transition.episodes == [Episode(-1.5, 3, 1)]

    @every_way
    @pytest.mark.parametrize("max_ep_len", [None, 3])
    def test_are_the_same_in_every_way(self, way, max_ep_len):
        """All vectorizations and autoreset modes: cleanrl 499 and 534, torchrl 2473; statistics: Gymnasium 1624."""
        fns, actions = scripted(3, **MIXED), box_actions(23, 3)
        assert play(rank(way(fns), max_ep_len=max_ep_len), actions) == play_alone(fns, actions, max_ep_len)

    @every_sync_way
    def test_terminated_wins_over_truncated(self, way):
        """EmbodiChain 612: an end that is both must not bootstrap, max_ep_len's included."""
        for end, max_ep_len in (("both", None), ("terminated", 2), ("both", 2)):
            fns = scripted(2, horizon=2, end=end)
            for steps in play(rank(way(fns), max_ep_len=max_ep_len), box_actions(4, 2)).steps:
                assert [(step.terminated, step.truncated) for step in steps] == [(False, False), (True, False)] * 2

    @every_sync_way
    def test_max_ep_len_truncates(self, way):
        played = play(rank(way(scripted(2, horizon=100)), max_ep_len=3), box_actions(7, 2))
        assert [step.truncated for step in played.steps[1]] == [False, False, True] * 2 + [False]
        assert played.steps[1][2].after[:12] == bytes_of(1, 0, 3)
        assert played.steps[1][3].before == bytes_of(1, 1, 0, 0)
        assert played.episodes == [[(3.0, 3), (3.0, 3)]] * 2

    @every_sync_way
    def test_first_episodes_are_cut_and_not_counted(self, way):
        """The first environment's is cut by its own limit, the second's by max_ep_len, the third's ends before."""
        fns = [partial(ScriptedEnv, g=g, horizon=horizon, end="terminated") for g, horizon in enumerate((4, 100, 2))]
        played = play(rank(way(fns), max_ep_len=5, first_ep_lens=[3, 5, 3]), box_actions(9, 3))
        ends = [[t + 1 for t, step in enumerate(steps) if step.truncated] for steps in played.steps]
        assert ends == [[3], [5], []]
        assert [len(step.after) for step in played.steps[0]] == [16] * 9
        assert played.steps[0][2].after[:12] == bytes_of(0, 0, 3) and played.steps[0][3].before == bytes_of(0, 1, 0, 0)
        assert played.episodes == [[(4.0, 4)], [(5.0, 5)], [(2.0, 2)] * 4]
        recorded = [lambda fn=fn: RecordEpisodeStatistics(fn()) for fn in fns]  # which knows of no cut
        assert play(rank(way(recorded), max_ep_len=5, first_ep_lens=[3, 5, 3]), box_actions(9, 3)) == played

    @pytest.mark.parametrize("name", ["list", "sync, next step", "sync, disabled", "sync, next step, no copy"])
    def test_arrays_may_be_reused(self, name):
        """SuperSuit 116, baselines 418, tianshou 1281."""
        fns, actions = scripted(3, **MIXED), box_actions(23, 3)
        reusing = scripted(3, **MIXED, reuse=True)
        assert play(rank(WAYS[name](reusing)), actions) == play_alone(fns, actions)

    @every_sync_way
    def test_are_not_changed_by_later_steps(self, way):
        """What a step returned still holds after the next ones."""
        environments = rank(way(scripted(2, horizon=2)))
        out = np.zeros((2, 4), np.float32)
        environments.reset(out)
        transitions = [environments.step(action, out) for action in box_actions(4, 2)]
        assert [transition.truncated.all() for transition in transitions] == [False, True, False, True]
        assert [transition.final_observations[0][1] for transition in transitions[1::2]] == [0, 1]
        with pytest.raises(ValueError, match="read-only"):
            transitions[0].truncated[0] = True

    @every_sync_way
    def test_leave_the_actions_alone(self, way):
        """An environment that changes its action in place, or keeps it, does not reach the caller's array."""

        class Clipping(ScriptedEnv):
            def step(self, action):
                action += 1
                return super().step(action)

        actions = box_actions(3, 2)
        given = actions.copy()
        play(rank(way([Clipping, Clipping])), given)
        assert (given == actions).all()

    @every_sync_way
    def test_discrete_spaces(self, way):
        """Observations of a Discrete space are numbers, and actions reach the environment as they are."""
        seen: list[Any] = []

        class Counting(gym.Env):
            observation_space, action_space = Discrete(4, start=3), Discrete(2, start=5)

            def reset(self, *, seed=None, options=None):
                self.state = 3
                return self.state, {}

            def step(self, action):
                seen.append(action)
                self.state += 1
                return self.state, 1, self.state == 6, False, {}

        played = play(rank(way([Counting, Counting])), np.array([[5, 6], [6, 5], [5, 5], [5, 6]]))
        states = [np.frombuffer(step.before + step.after, np.int64).tolist() for step in played.steps[0]]
        assert states == [[3, 4], [4, 5], [5, 6], [3, 4]]
        assert [step.terminated for step in played.steps[0]] == [False, False, True, False]
        assert [int(action) for action in seen] == [5, 6, 6, 5, 5, 5, 5, 6]
        assert played.episodes == [[(3.0, 3)]] * 2

    def test_a_second_reset_begins_anew(self):
        environments = rank([gym.make("CartPole-v1") for _ in range(2)], max_ep_len=3)
        first, again, after = (np.zeros((2, 4), np.float32) for _ in range(3))
        environments.reset(first)
        for _ in range(4):
            environments.step(np.array([0, 1]), after)
        environments.reset(again)
        assert (again == first).all()
        ends = [environments.step(np.array([0, 1]), after).truncated.all() for _ in range(4)]
        assert ends == [False, False, True, False]


class TestVectorEnvironments:
    def test_without_a_mode(self):
        for metadata in ({}, {"autoreset_mode": None}, {"autoreset_mode": "Sometimes"}):
            vector = SyncVectorEnv(scripted(2))
            vector.metadata = metadata
            del vector.autoreset_mode
            with pytest.raises(
                ConfigurationError, match=r"make_vec_env_fn: metadata\['autoreset_mode'\].* is (None|'Some)"
            ):
                rank(vector)
            vector.metadata = {"autoreset_mode": DISABLED}
            rank(vector)

    def test_whose_pending_reset_cannot_be_cancelled(self):
        """Gymnasium's AsyncVectorEnv without shared memory would lose the action after each episode."""
        vector = AsyncVectorEnv(scripted(2), shared_memory=False)
        with pytest.raises(ConfigurationError, match="shared_memory=False"):
            rank(vector)
        vector.close()

    def test_that_take_one_seed_only(self):
        vector = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
        with pytest.raises(ConfigurationError, match="does not accept a sequence of seeds.*use SyncVectorEnv"):
            rank(vector).reset(np.zeros((2, 4), np.float32))

    def test_that_fail_on_a_sequence_of_seeds(self):
        class Single(VectorEnv):
            num_envs, metadata = 2, {"autoreset_mode": SAME_STEP}
            single_observation_space, single_action_space = ScriptedEnv().observation_space, ScriptedEnv().action_space

            def reset(self, *, seed=None, options=None):
                return np.zeros((2, 4), np.float32), {"seed": int(seed)}

        with pytest.raises(ConfigurationError, match="does not accept a sequence of seeds.*use SyncVectorEnv"):
            rank(Single()).reset(np.zeros((2, 4), np.float32))

    def test_whose_environments_fail_at_their_reset(self):
        class Broken(ScriptedEnv):
            def reset(self, *, seed=None, options=None):
                raise ValueError("level 3 has 11 columns")

        with pytest.raises(ValueError, match="^level 3 has 11 columns$"):
            rank(SyncVectorEnv([Broken, Broken])).reset(np.zeros((2, 4), np.float32))

    def test_without_the_last_observations(self):
        class Forgetful(SyncVectorEnv):
            def step(self, actions):
                *stepped, infos = super().step(actions)
                infos.pop("final_obs", None)
                return *stepped, infos

        with pytest.raises(ConfigurationError, match=r"under SAME_STEP, step\(\) must return infos\['final_obs'\]"):
            play(rank(Forgetful(scripted(2), autoreset_mode=SAME_STEP)), box_actions(20, 2))

    def test_that_reset_more_than_they_should(self):
        class Careless(SyncVectorEnv):
            def reset(self, *, seed=None, options=None):
                return super().reset(seed=seed)

        for copy in (True, False):  # or one array for all observations
            fns = [partial(ScriptedEnv, g=g, horizon=2 + g) for g in range(2)]
            with pytest.raises(ConfigurationError, match="reset_mask.* resets all environments"):
                play(rank(Careless(fns, copy=copy)), box_actions(2, 2))


class TestStatistics:
    @every_sync_way
    @pytest.mark.parametrize("max_ep_len", [None, 3])
    def test_reports_agree_with_counting(self, way, max_ep_len):
        """With RecordEpisodeStatistics around each environment, all episodes are still there, and once."""
        fns, actions = scripted(3, **MIXED), box_actions(40, 3)
        wrapped = [lambda fn=fn: RecordEpisodeStatistics(fn()) for fn in fns]
        played = play(rank(way(wrapped), max_ep_len=max_ep_len), actions)
        assert played == play_alone(fns, actions, max_ep_len)

    @every_sync_way
    def test_reports_are_believed(self, way):
        """Every third end is the end of a game, as with lives: from the first report on, only games count."""

        def info(g: int, episode: int, step: int) -> dict[str, Any]:
            return {"episode": {"r": 1000.0 * (g + 1) + episode, "l": 24}} if episode % 3 == 2 and step == 2 else {}

        played = play(rank(way(scripted(2, horizon=2, info=info))), box_actions(20, 2))
        for g in range(2):
            games = [(1000.0 * (g + 1) + episode, 24) for episode in (2, 5, 8)]
            assert played.episodes[g] == [(2.0, 2), (2.0, 2), *games]

    def test_one_environment_reports(self):
        """The others keep being counted here."""
        environments = [ScriptedEnv(g=0, horizon=2), RecordEpisodeStatistics(ScriptedEnv(g=1, horizon=3))]
        played = play(rank(environments), box_actions(12, 2))
        assert played.episodes == [[(2.0, 2)] * 6, [(3.0, 3)] * 4]

    @pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
    def test_another_wrapper_that_counts(self, vector):
        played = play(rank(vector([lambda: Monitor(ScriptedEnv(horizon=3))] * 2)), box_actions(12, 2))
        assert played.episodes[0][0] == (3.0, 3)

    def test_a_report_at_any_step(self):
        def info(g: int, episode: int, step: int) -> dict[str, Any]:
            return {"episode": {"r": np.float32(7), "l": np.int32(9)}} if step == 1 else {}

        played = play(rank([ScriptedEnv(horizon=3, info=info)]), box_actions(6, 1))
        assert played.episodes == [[(7.0, 9), (7.0, 9)]]

    @pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP, DISABLED])
    @pytest.mark.parametrize("max_ep_len", [None, 3])
    def test_the_vector_wrapper_forgets_steps(self, mode, max_ep_len):
        """RecordEpisodeStatistics around a vector environment clears all counts when one environment is reset."""
        fns, actions = scripted(3, **MIXED), box_actions(40, 3)
        vector = VectorRecordEpisodeStatistics(SyncVectorEnv(fns, autoreset_mode=mode))
        played = play(rank(vector, max_ep_len=max_ep_len), actions)
        expected = play_alone(fns, actions, max_ep_len)
        assert played.steps == expected.steps
        for mine, wanted in zip(played.episodes, expected.episodes, strict=True):
            assert mine == pytest.approx(np.array(wanted))

    def test_are_raw(self):
        """Long sums are right to the last bits, and no later wrapper is needed."""
        rewards = np.random.default_rng(0).normal(size=1000)
        environments = rank([ScriptedEnv(horizon=1000, reward=lambda g, episode, step: rewards[step - 1])])
        [[(return_, length)]] = play(environments, box_actions(1000, 1)).episodes
        assert return_ == pytest.approx(rewards.sum(), abs=1e-12) and length == 1000


class TestHook:
    @every_sync_way
    def test_sees_every_observation(self, way):
        """First, later and final observations pass through the hook, each environment's in their order."""
        space = Box(-np.inf, np.inf, (2,), np.float32)
        buffer = np.zeros(2)

        def hook(observation: np.ndarray) -> np.ndarray:
            buffer[:] = observation[2], 10 * observation[1]
            return buffer  # one array for all: it must be copied

        environments = rank(way(scripted(2, horizon=2)), state_processing_hook=hook, obs_space_override=space)
        assert environments.observation_space is space
        steps = play(environments, box_actions(3, 2)).steps[1]
        numbers = [np.frombuffer(step.before + step.after, np.float32).tolist() for step in steps]
        assert numbers == [[0, 0, 1, 0], [1, 0, 2, 0], [0, 10, 1, 10]]

    @every_sync_way
    def test_that_changes_the_shape_needs_a_space(self, way):
        environments = rank(way(scripted(2)), first_global_index=4, state_processing_hook=lambda x: x[:3])
        with pytest.raises(TrainingError, match=r"environment 4: state_processing_hook .*\(3,\).* obs_space_override"):
            environments.reset(np.zeros((2, 4), np.float32))

    @every_sync_way
    def test_that_scales_bytes_needs_a_space(self, way):
        """Scaled to [0, 1] and stored as bytes, every image would be black."""

        class Image(ScriptedEnv):
            def __init__(self):
                super().__init__()
                self.observation_space = Box(0, 255, (4,), np.uint8)

            def _observe(self, action):
                return np.full(4, 200, np.uint8)

        out = np.zeros((1, 4), np.uint8)
        with pytest.raises(TrainingError, match="state_processing_hook .*float64.*obs_space_override"):
            rank(way([Image]), state_processing_hook=lambda x: x / 255).reset(out)
        scaled = Box(0, 1, (4,), np.float32)
        environments = rank(way([Image]), state_processing_hook=lambda x: x / 255, obs_space_override=scaled)
        environments.reset(out := np.zeros((1, 4), np.float32))
        assert out == pytest.approx(200 / 255)


class TestErrors:
    @pytest.mark.parametrize("at", [0, 2])
    @pytest.mark.parametrize(("fault", "shape"), [("shape", "(3,)"), ("scalar", "()")])
    def test_observation_of_a_wrong_shape(self, fault, shape, at):
        """NumPy would broadcast a scalar over the whole observation."""
        environments = rank([ScriptedEnv(), FaultyEnv(fault, at, in_episode=1, horizon=3)], first_global_index=6)
        with pytest.raises(
            TrainingError, match=re.escape(f"environment 7: env_fn gave an observation of shape {shape}")
        ):
            play(environments, box_actions(6, 2))

    @pytest.mark.parametrize(("fault", "text"), [("vector reward", "array([1.])"), ("no reward", "None")])
    def test_reward_that_is_no_number(self, fault, text):
        environments = rank([ScriptedEnv(), FaultyEnv(fault, 2)], first_global_index=6)
        with pytest.raises(TrainingError, match=re.escape(f"environment 7: env_fn gave the reward {text}")):
            play(environments, box_actions(6, 2))

    def test_rewards_of_a_vector_that_are_no_numbers(self):
        class Column(SyncVectorEnv):
            def step(self, actions):
                observations, rewards, *rest = super().step(actions)
                return observations, rewards[:, None], *rest

        with pytest.raises(
            TrainingError, match=re.escape("make_vec_env_fn: Column(num_envs=2) gave rewards of shape (2, 1)")
        ):
            play(rank(Column(scripted(2))), box_actions(3, 2))

    @pytest.mark.parametrize("reward", [3, True, np.float32(3), np.int64(3), np.array(3.0), np.array(3, np.uint8)])
    def test_reward_of_any_scalar_type(self, reward):
        environments = rank([ScriptedEnv(horizon=2, reward=lambda g, episode, step: reward)])
        played = play(environments, box_actions(2, 1))
        assert [step.reward for step in played.steps[0]] == [float(reward)] * 2
        assert played.episodes == [[(2 * float(reward), 2)]]

    def test_not_a_number_is_handed_on(self):
        """Whole rollouts are checked for it, which costs less."""
        played = play(rank([FaultyEnv("nan", 1), FaultyEnv("nan reward", 2)]), box_actions(3, 2))
        assert np.isnan(np.frombuffer(played.steps[0][0].after, np.float32)).all()
        assert np.isnan([step.reward for step in played.steps[1]]).tolist() == [False, True, False]

    @every_sync_way
    def test_of_an_environment_pass(self, way):
        fns = [ScriptedEnv, partial(FaultyEnv, "raise", 2)]
        with pytest.raises(RuntimeError, match="scripted"):
            play(rank(way(fns)), box_actions(3, 2))

    def test_too_few_actions(self):
        environments = rank([ScriptedEnv(), ScriptedEnv()])
        with pytest.raises(IndexError):
            play(environments, box_actions(3, 1))


class Monitor(gym.Wrapper):
    """Keeps the returns and lengths of all its episodes, as Stable-Baselines3's wrapper of this name does."""

    def __init__(self, environment: gym.Env) -> None:
        super().__init__(environment)
        self.episode_returns: list[float] = []
        self.episode_lengths: list[int] = []

    def step(self, action: Any) -> Any:
        stepped = self.env.step(action)
        if stepped[2] or stepped[3]:
            self.episode_returns.append(3.0)
            self.episode_lengths.append(3)
        return stepped


class TestSpaces:
    def test_supported(self):
        for observation in (Box(-1, 1, ()), Box(-np.inf, np.inf, (3, 4)), Discrete(3), Discrete(3, start=-1)):
            for action in (Box(-1, 1, (2, 3)), Box(-np.inf, np.inf, (1,)), Discrete(2), Discrete(2, start=7)):
                check_spaces(observation, action)

    @pytest.mark.parametrize("space", [MultiDiscrete([2, 2]), MultiBinary(2), Tuple([Discrete(2)])], ids=str)
    def test_not_supported(self, space):
        with pytest.raises(ConfigurationError, match="action space " + re.escape(str(space))):
            check_spaces(Discrete(2), space)
        with pytest.raises(ConfigurationError, match="observation space " + re.escape(str(space))):
            check_spaces(space, Discrete(2))
        with pytest.raises(ConfigurationError, match="^obs_space_override: the observation space"):
            rank([ScriptedEnv()], state_processing_hook=lambda x: x, obs_space_override=space)
        with pytest.raises(ConfigurationError, match="action space"):
            rank([ScriptedEnv(action_space=space)])
        with pytest.raises(ConfigurationError, match="observation space"):
            rank([ScriptedEnv()], obs_space_override=space)

    def test_of_all_environments_are_equal(self):
        environments = [ScriptedEnv(), ScriptedEnv(), ScriptedEnv(action_space=Discrete(3))]
        with pytest.raises(ConfigurationError, match=r"the action_space of environment 12 is Discrete\(3\)"):
            rank(environments, first_global_index=10)

    def test_no_environment_twice(self):
        environment = gym.make("CartPole-v1")
        with pytest.raises(ConfigurationError, match="environments 4 and 5 are the same object"):
            rank([environment, gym.Wrapper(environment)], first_global_index=4)


def first_observations(environments: Environments) -> list[bytes]:
    out = np.zeros((environments.num_envs, *(environments.observation_space.shape or ())), np.float32)
    environments.reset(out)
    return [row.tobytes() for row in out]


class TestSeeds:
    @every_sync_way
    def test_tell_environments_and_runs_apart(self, way):
        """Equal seeds on ranks: ray 46986, torchrl 4208; a seed that is ignored: spinningup 310."""
        make = partial(gym.make, "CartPole-v1")
        runs = {(seed, g): first_observations(rank(way([make] * 2), seed, g)) for seed in (0, 1) for g in (0, 2, 4)}
        assert len({row for rows in runs.values() for row in rows}) == 12
        assert first_observations(rank(way([make] * 2), 1, 4)) == runs[1, 4]
        assert first_observations(rank(way([make] * 4), 1, 2)) == runs[1, 2] + runs[1, 4]
        assert first_observations(rank([make(), make()], 1, 4)) == runs[1, 4]

    def test_reach_environments_with_other_random_numbers_than_gymnasiums(self):
        """As those of dm_control through Shimmy, whose np_random is a RandomState."""

        class Old(ScriptedEnv):
            @property
            def np_random(self):
                return self.random

            def reset(self, *, seed=None, options=None):
                if seed is not None:
                    self.random = np.random.RandomState(seed)
                observation, info = super().reset(options=options)
                self.g = self.np_random.randn()
                return observation, info

        def episodes(seed: int) -> list[float]:
            environment, out = Old(horizon=1), np.zeros((1, 4), np.float32)
            environments = rank([environment], seed)
            environments.reset(out)
            found = []
            for action in box_actions(3, 1):
                environments.step(action, out)
                found.append(environment.g)
            return found

        assert len({*episodes(0), *episodes(1)}) == 6
        assert episodes(0) == episodes(0)

    def test_are_positive_32_bit_integers(self):
        seeds = [first_seed(seed, g) for seed in (0, 1, 2**40) for g in range(100)]
        assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
        assert len(set(seeds)) == 300

    @pytest.mark.parametrize("way", [WAYS["list"], WAYS["sync, next step"], WAYS["sync, disabled"]])
    def test_split_over_ranks(self, way):
        """R x N = 1x4, 2x2 and 4x1 collect the same data."""
        actions = np.random.default_rng(0).integers(2, size=(40, 4))
        make = partial(gym.make, "CartPole-v1")
        whole = play(rank(way([make] * 4), 7), actions)
        for n in (1, 2):
            parts = [play(rank(way([make] * n), 7, g), actions[:, g : g + n]) for g in range(0, 4, n)]
            assert [steps for part in parts for steps in part.steps] == whole.steps
            assert [episodes for part in parts for episodes in part.episodes] == whole.episodes


@pytest.fixture
def half_cheetah() -> Iterator[Callable[[], gym.Env]]:
    mujoco = pytest.importorskip("mujoco")
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    yield partial(gym.make, "HalfCheetah-v5")
    mujoco.set_mju_user_warning(before)


def pong() -> gym.Env:
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    game = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    return gym.wrappers.AtariPreprocessing(game, noop_max=30)


class TestEpisodes:
    """An episode is a function of (seed, global index, number of the episode) and its actions."""

    def check(self, make: Callable[[], gym.Env], varied: bool = True) -> None:
        """Compare third episodes that came after others of different lengths, and after other actions."""
        thirds, firsts = [], set()
        for length in (20, 31):
            environments = rank([make()], seed=3, first_global_index=5, max_ep_len=length)
            space, shape = environments.action_space, environments.observation_space.shape or ()
            space.seed(length)
            out = np.zeros((1, *shape), environments.observation_space.dtype)
            environments.reset(out)
            firsts.add(out.tobytes())
            for _ in range(2):
                while not environments.step(np.array([space.sample()]), out).final_observations:
                    pass
                firsts.add(out.tobytes())
            space.seed(0)
            third = [out.tobytes()]
            for _ in range(20):
                transition = environments.step(np.array([space.sample()]), out)
                observation = transition.final_observations.get(0, out[0])
                third += [observation.tobytes(), transition.rewards.tobytes(), transition.terminated.tobytes()]
            thirds.append(third)
            environments.close()
        assert thirds[0] == thirds[1]
        if varied:
            assert len(firsts) == 3

        # A fresh environment begins that episode as well, whatever it was seeded with.
        environment = make()
        environment.reset(seed=99)
        environment.unwrapped.np_random = generator(3, EPISODES, 5, 2)
        observation, _ = environment.reset()
        assert observation.tobytes() == thirds[0][0]
        environment.close()

    def test_cartpole(self):
        self.check(partial(gym.make, "CartPole-v1"))

    def test_half_cheetah(self, half_cheetah):
        self.check(half_cheetah)

    def test_pong(self):
        """Pong differs from one episode to the next in the no-op actions alone, of which few can be seen."""
        self.check(pong, varied=False)


class TestAtari:
    """ALE's own vector environment, against Gymnasium's wrappers around single games."""

    options: dict[str, Any] = {"noop_max": 0, "reward_clipping": False, "use_fire_reset": False}

    def vector(self, mode: AutoresetMode, **kwargs: Any) -> VectorEnv:
        gym.register_envs(pytest.importorskip("ale_py"))
        return gym.make_vec(
            "ALE/Pong-v5",
            num_envs=2,
            vectorization_mode="vector_entry_point",
            autoreset_mode=mode,
            repeat_action_probability=0.0,
            **kwargs,
        )

    @pytest.mark.parametrize("max_ep_len", [None, 37])
    def test_transitions_are_the_same(self, max_ep_len):
        """Whole games of about 800 steps, and truncated ones; environment 0 does nothing, the other moves at random."""
        gym.register_envs(pytest.importorskip("ale_py"))
        steps = 900 if max_ep_len is None else 120
        actions = np.random.default_rng(0).integers(6, size=(steps, 2))
        actions[:, 0] = 0

        def single() -> gym.Env:
            game = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
            frames = gym.wrappers.AtariPreprocessing(game, noop_max=0)
            return gym.wrappers.FrameStackObservation(frames, 4, padding_type="zero")

        expected = play(rank([single(), single()], max_ep_len=max_ep_len), actions)
        assert all(expected.episodes) and any(step.reward for step in expected.steps[0]) == (max_ep_len is None)
        for mode in (NEXT_STEP, SAME_STEP):
            played = play(rank(self.vector(mode, **self.options), max_ep_len=max_ep_len), actions)
            assert played == expected

    def test_no_action_is_lost(self):
        """Against the raw environment under NEXT_STEP without its dead steps; resets draw no-ops at random."""
        actions = np.random.default_rng(0).integers(6, size=(60, 2))
        options = {"max_num_frames_per_episode": 50, "noop_max": 30}
        raw = self.vector(NEXT_STEP, **options)
        seeds: Any = np.array([first_seed(0, 0), first_seed(0, 1)])
        before, _ = raw.reset(seed=seeds)
        expected: list[list[Step]] = [[], []]
        dead = np.zeros(2, dtype=bool)
        while min(map(len, expected)) < len(actions):
            action = np.array([actions[min(len(expected[i]), len(actions) - 1), i] for i in range(2)])
            after, rewards, terminated, truncated, _ = raw.step(action)
            for i in np.flatnonzero(~dead):
                flags = bool(terminated[i]), bool(truncated[i])
                expected[i].append(Step(before[i].tobytes(), float(rewards[i]), *flags, after[i].tobytes()))
            before, dead = after.copy(), terminated | truncated
        raw.close()
        assert sum(step.truncated for step in expected[0][:60]) >= 3
        for mode in (NEXT_STEP, SAME_STEP):
            played = play(rank(self.vector(mode, **options)), actions)
            assert played.steps == [steps[:60] for steps in expected]

    def test_modes_do_not_mix(self):
        """All of ALE's vector environments share one `metadata`, into which the last one writes its mode."""
        options = {**self.options, "max_num_frames_per_episode": 50}
        vectors = [self.vector(mode, **options) for mode in (NEXT_STEP, SAME_STEP)]
        actions = np.zeros((30, 2), np.int64)
        first, second = (play(rank(vector), actions) for vector in vectors)
        assert first == second and first.episodes[0]


def test_a_first_episode_that_is_taken_up_again_keeps_its_cut() -> None:
    former, resumed = (rank([gym.make("Pendulum-v1") for _ in range(2)], first_ep_lens=[5, 7]) for _ in range(2))
    out, again = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    former.reset(out)
    actions = box_actions(9, 2)[..., :1]
    for action in actions[:3]:
        former.step(action, out)
    assert resumed.resume(former.progress(), out.copy(), again) == []
    ends = [resumed.step(action, again).truncated.tolist() for action in actions[3:]]
    assert ends == [[False, False], [True, False], [False, False], [False, True], [False, False], [False, False]]


def test_a_cut_that_is_still_to_come_outlives_any_number_of_resumes() -> None:
    """Episodes that begin after a resume on another number of environments have cuts, and no longer the number 0."""
    whole, first, second = (rank([gym.make("Pendulum-v1") for _ in range(2)], first_ep_lens=[5, 7]) for _ in range(3))
    out, again = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    for environments in (whole, first):
        environments.reset(out, 4)
    actions = box_actions(9, 2)[..., :1]
    for action in actions[:3]:
        first.step(action, again)
    assert second.resume(first.progress(), again.copy(), again) == []
    ends = [whole.step(action, out).truncated.tolist() for action in actions]
    assert [second.step(action, again).truncated.tolist() for action in actions[3:]] == ends[3:]
    assert ends[4] == [True, False] and ends[6] == [False, True]
    former = {name: x for name, x in first.progress().items() if name != "cuts"}  # as an earlier version wrote it
    assert second.resume({**former, "episodes": np.zeros(2, np.int64)}, again.copy(), again) == [0, 1]


class Giving(gym.Env):
    """Its space has bytes; it gives what it is told to, at the reset and at the steps."""

    observation_space, action_space = gym.spaces.Box(0, 255, (2,), np.uint8), gym.spaces.Discrete(2)

    def __init__(self, first: np.ndarray, later: np.ndarray) -> None:
        self.first, self.later = first, later

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.first, {}

    def step(self, action: Any) -> Any:
        return self.later, 0.0, False, False, {}


BYTES = np.array([3, 255], np.uint8)


@pytest.mark.parametrize("counted", [3, {"reward": 3.0}, {"r": 3.0}], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_what_an_environment_calls_episode_need_not_be_a_report(name: str, counted: Any) -> None:
    class Counting(ScriptedEnv):
        def step(self, action: Any) -> Any:
            *stepped, info = super().step(action)
            return *stepped, {**info, "episode": counted}

    environments, out = rank(WAYS[name]([lambda: Counting(horizon=3)])), np.zeros((1, 4), np.float32)
    environments.reset(out)
    found = [e for action in box_actions(8, 1) for e in environments.step(action, out).episodes]
    assert [e.length for e in found] == [3, 3]
    environments.close()


@pytest.mark.parametrize("given", [np.array([3, 255]), np.array([3, 255], np.uint16), [3, 255], BYTES], ids=str)
def test_whole_numbers_of_another_dtype_are_kept(given: Any) -> None:
    environments, out = rank([Giving(given, given)]), np.zeros((1, 2), np.uint8)
    environments.reset(out)
    assert out.tolist() == [[3, 255]]
    environments.step(np.zeros(1, np.int64), out)
    assert out.tolist() == [[3, 255]]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.array([300, 1]), "observation of dtype int64 from 1 to 300 for Box"),
        (np.array([-1, 1]), "from -1 to 1"),
        (np.array([0.5, 0.5], np.float32), "observation of dtype float32 for Box"),
        (np.array([1.0, 0.0]), "observation of dtype float64"),
    ],
    ids=str,
)
def test_numbers_that_a_space_of_bytes_would_change_are_refused(given: np.ndarray, text: str) -> None:
    out = np.zeros((1, 2), np.uint8)
    with pytest.raises(TrainingError, match=text):
        rank([Giving(given, BYTES)]).reset(out)
    environments = rank([Giving(BYTES, given)])
    environments.reset(out)
    with pytest.raises(TrainingError, match=text):
        environments.step(np.zeros(1, np.int64), out)


class Chosen(ScriptedEnv):
    """It gives choices 3, 4, 5, ...: of the three that its space has, and of no others."""

    def __init__(self) -> None:
        super().__init__(horizon=100)
        self.observation_space = gym.spaces.Discrete(3, start=3)

    def reset(self, **keywords: Any) -> tuple[Any, dict]:
        return np.int64(3), super().reset(**keywords)[1]

    def step(self, action: Any) -> Any:
        return np.int64(3 + self.steps + 1), *super().step(action)[1:]


@pytest.mark.parametrize("name", WAYS)
def test_a_choice_that_its_space_does_not_have_is_refused(name: str) -> None:
    environments, out = rank(WAYS[name]([Chosen])), np.zeros(1, np.int64)
    environments.reset(out)
    for action, seen in zip(box_actions(2, 1), (4, 5), strict=True):
        environments.step(action, out)
        assert out == seen
    with pytest.raises(TrainingError, match=r"environment 0: env_fn gave an observation of 6 for Discrete"):
        environments.step(box_actions(1, 1)[0], out)
    environments.close()


@pytest.mark.parametrize("name", WAYS)
def test_what_a_limit_around_the_recorder_ends_counts_too(name: str) -> None:
    """Else only episodes that the task itself ends would count once one of them was reported."""
    horizons = (3, 100, 100, 4, 100)

    def limited() -> gym.Env:
        inner = ScriptedEnv(horizon=lambda g, episode: horizons[episode % 5], end="terminated")
        return TimeLimit(RecordEpisodeStatistics(inner), 7)

    environments, out = rank(WAYS[name]([limited])), np.zeros((1, 4), np.float32)
    environments.reset(out)
    found = [e for action in box_actions(3 + 7 + 7 + 4 + 7, 1) for e in environments.step(action, out).episodes]
    assert found == [Episode(float(n), n, 0) for n in (3, 7, 7, 4, 7)]
    environments.close()


class Game(ScriptedEnv):
    """An episode of 9 steps, of which every third costs a life; `in_hurry` loses the first life a step before."""

    in_hurry = False

    def reset(self, **keywords: Any) -> tuple[np.ndarray, dict]:
        return super().reset(**keywords)[0], {"lives": 3}

    def step(self, action: Any) -> Any:
        *result, _ = super().step(action)
        return *result, {"lives": 3 - (self.steps + self.in_hurry) // 3}


@pytest.mark.parametrize("name", ["list", "sync, next step", "sync, disabled", "async, next step"])
def test_a_game_that_max_ep_len_ends_is_reported_with_all_its_lives(name: str) -> None:
    environments = rank(WAYS[name]([lambda: LostLifeEnds(RecordEpisodeStatistics(Game(horizon=100)))]), max_ep_len=10)
    out = np.zeros((1, 4), np.float32)
    environments.reset(out)
    found = [e for action in box_actions(18, 1) for e in environments.step(action, out).episodes]
    assert found == [Episode(16.0, 16, 0)]  # two lives of 3 steps, and 10 of the third
    environments.close()


def test_a_game_that_cannot_be_taken_up_again_is_left() -> None:
    """After a repetition that loses a life at another moment, a reset would go on with the game of that."""
    games = Game(horizon=9), Game(horizon=9)
    former, resumed = (rank([LostLifeEnds(RecordEpisodeStatistics(game))]) for game in games)
    out, again = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    former.reset(out)
    for action in box_actions(5, 1):
        former.step(action, out)
    games[1].in_hurry = True
    assert resumed.resume(former.progress(), out.copy(), again) == [0]
    assert again[0, 2] == games[1].steps == 0
    assert [e.length for action in box_actions(9, 1) for e in resumed.step(action, again).episodes] == [9]


def test_of_very_long_episodes_no_actions_are_kept_and_they_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_mpi_base.envs.RECORDED_STEPS", 4)
    horizons = (3, 1000)
    former, resumed = (rank([ScriptedEnv(g, horizon=horizons[g]) for g in range(2)]) for _ in range(2))
    out, again = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    former.reset(out)
    for action in box_actions(8, 2):
        former.step(action, out)
    progress = former.progress()
    assert progress["lengths"].tolist() == [2, 8]
    assert progress["actions0"].shape == (2, 2) and progress["actions1"].shape == (0, 2)
    assert resumed.resume(progress, out.copy(), again) == [1]
    for action in box_actions(3, 2):
        former.step(action, out), resumed.step(action, again)
    assert resumed.progress()["lengths"].tolist() == [2, 3]


def test_actions_of_whole_numbers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^env_fn: the action space Box.* has dtype int32, .* use Discrete"):
        check_spaces(Box(-1, 1, (2,)), Box(0, 9, (2,), np.int32))
