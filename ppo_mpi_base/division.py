# SPDX-License-Identifier: MIT
"""How ranks share the training of policy and value network: all train both, or half of the ranks each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ppo_mpi_base.config import Config
from ppo_mpi_base.flat_parameters import Adam, FlatParameters
from ppo_mpi_base.mpi import Communicator
from ppo_mpi_base.policies import ActorCritic
from ppo_mpi_base.rollout import Batch

NETWORKS = ("policy", "value")
"""What even ranks train and what odd ranks do, by the names of the slices."""
MOST_UNEVEN = 1.5
"""How many times as many parameters one network may have: of two that are less alike, half of the ranks would wait."""


class Undivided:
    """All ranks train all networks, each from its own samples.

    Attributes:
        team: the ranks that train what this one does, over which gradients are summed.
        idle: the slices of parameters that it leaves to others.
        others: the losses and statistics that they compute.
    """

    def __init__(self, ranks: Communicator) -> None:
        self.team = ranks
        self.idle: frozenset[str] = frozenset()
        self.others: frozenset[str] = frozenset()

    def minibatch_size(self, of_a_rank: int) -> int:
        """Return how many samples a minibatch of this rank has, where each rank brings so many to it."""
        return of_a_rank

    def share(
        self, samples: Batch, orders: Iterable[np.ndarray], size: int, seconds: dict[str, float]
    ) -> tuple[Batch, Iterable[np.ndarray]]:
        """Return all samples that this rank trains from, and the order of each epoch.

        Args:
            samples: those of this rank, S of them.
            orders: of each epoch, (S,) indices into them.
            size: samples that a rank brings to a minibatch.
            seconds: phase name -> seconds; those of messages and waiting are added.
        """
        return samples, orders

    def bring_together(
        self, flat: FlatParameters, adam: Adam, means: np.ndarray, seconds: dict[str, float]
    ) -> np.ndarray:
        """Give this rank what others have trained in its place, after the updates of an iteration.

        Args:
            flat: all parameters; those of `idle`, and their gradients, are overwritten.
            adam: likewise, its moments.
            means: (S,), of all statistics; NaN where this rank does not compute one.
            seconds: as for `share`.

        Returns:
            (S,) the means of all statistics; NaN where no rank computes one.
        """
        return means


class Divided(Undivided):
    """Even ranks train the policy, odd ones the value network, each from the samples of itself and of its partner.

    The updates are those that all ranks would make together, to the rounding of sums: the same samples, drawn in the
    same order, are in each. But a rank makes half as many calls, on twice as many samples each, and reduces gradients
    over half of the ranks, of two not at all.

    Args:
        ranks: an even number. Ranks 0 and 1 are partners, 2 and 3, and so on.
        origins: of each loss and statistic, by its name: the networks that it is computed from, at most one each.
    """

    def __init__(self, ranks: Communicator, origins: Mapping[str, frozenset[str]]) -> None:
        own = ranks.rank % 2
        self.team, self.pair = ranks.split(own), ranks.split(ranks.rank // 2)
        self.idle = frozenset({NETWORKS[1 - own]})
        # What comes from none is computed once too, by the policy's ranks.
        of_value = frozenset(name for name, names in origins.items() if "value" in names)
        self.others = of_value if own == 0 else frozenset(origins) - of_value

    def minibatch_size(self, of_a_rank: int) -> int:
        """Return the samples of a minibatch: those of two ranks."""
        return 2 * of_a_rank

    def share(
        self, samples: Batch, orders: Iterable[np.ndarray], size: int, seconds: dict[str, float]
    ) -> tuple[Batch, Iterable[np.ndarray]]:
        """Return the samples of both ranks and their orders, in which minibatches of both take turns."""
        own = np.stack(list(orders))
        with self._exchange(seconds):
            of_both = [self._of_both(x).flatten(0, 1) for x in samples[:-1]]
            extras = {name: self._of_both(x).flatten(0, 1) for name, x in samples.extras.items()}
            drawn = self.pair.gather_arrays(own)
        drawn[1] += drawn.shape[-1]
        starts = range(0, drawn.shape[-1], size)
        together = (
            np.concatenate([order[start : start + size] for start in starts for order in epoch])
            for epoch in drawn.swapaxes(0, 1)
        )
        return Batch._make([*of_both, extras]), together

    def bring_together(
        self, flat: FlatParameters, adam: Adam, means: np.ndarray, seconds: dict[str, float]
    ) -> np.ndarray:
        """Take the other network from the partner, and return the means of all statistics."""
        partner = 1 - self.pair.rank  # and the place of its network in NETWORKS, as in `slices`
        part = flat.slices[NETWORKS[partner]]
        with self._exchange(seconds):
            for tensor in (flat.data, flat.gradient, adam.first_moment, adam.second_moment):
                tensor[part] = self._of_both(tensor)[partner, part]
            adam.steps[partner] = self.pair.gather_arrays(adam.steps)[partner, partner]
            flat.to_host()
            of_both = self.pair.gather_arrays(means)
        return np.where(np.isnan(of_both[0]), of_both[1], of_both[0])

    @contextmanager
    def _exchange(self, seconds: dict[str, float]) -> Iterator[None]:
        """Wait for the partner, then count the block's time as that of messages."""
        started = time.perf_counter()
        self.pair.barrier()
        arrived = time.perf_counter()
        seconds["waiting"] += arrived - started
        yield
        seconds["communication"] += time.perf_counter() - arrived

    def _of_both(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this rank and its partner, stacked."""
        as_bytes = tensor.cpu().contiguous().view(torch.uint8).numpy()  # NumPy lacks some of torch's dtypes
        of_both = torch.from_numpy(self.pair.gather_arrays(as_bytes))
        return of_both.view(tensor.dtype).to(tensor.device)


def choose_division(
    config: Config,
    ranks: Communicator,
    networks: ActorCritic,
    flat: FlatParameters,
    losses: Sequence[str],
    origins: Callable[[], Mapping[str, frozenset[str]]],
    tell: Callable[[str], None],
) -> Undivided:
    """Return how ranks share the training, as `config.divide_networks` asks for. Collective: call on all ranks.

    Args:
        config: all keywords.
        ranks: the run's.
        networks: those that are trained.
        flat: their parameters.
        losses: what they are called.
        origins: says of which networks each loss, as `<name>_loss`, and each statistic is made.
        tell: gets a line where the networks were to be divided and cannot be.
    """
    wanted = config.divide_networks
    if wanted is False:
        return Undivided(ranks)
    why = _why_not(config, ranks, networks, flat)
    if why is None and wanted == "auto" and not _alike(flat):
        why = "it would take longer"
    found: Mapping[str, frozenset[str]] = {}
    if why is None:
        try:
            found = origins()
            why = _why_indivisible(losses, found)
        except Exception as error:  # of the user's losses, under a tracer that they may not get on with
            why = f"the losses cannot be followed: {error}"
    if ranks.min(float(why is None)) == 1:
        return Divided(ranks, found)
    if wanted is True:
        tell(f"divide_networks: all ranks train both networks ({why})")
    return Undivided(ranks)


def _alike(flat: FlatParameters) -> bool:
    sizes = [part.stop - part.start for part in flat.slices.values()]
    return max(sizes) <= MOST_UNEVEN * min(sizes)


def _why_not(config: Config, ranks: Communicator, networks: ActorCritic, flat: FlatParameters) -> str | None:
    """Return why the networks cannot be divided, as far as losses do not decide it."""
    if ranks.size % 2 == 1:
        return "their number is odd"
    if sum(part.stop > part.start for part in flat.slices.values()) < 2:
        return "there is only one that is trained"
    if config.train_pi_epochs != config.train_v_epochs or config.target_kl > 0:
        return "the policy's updates and the value's may end apart"
    if networks.network_buffers():
        return "they have buffers, which change with the samples of a rank"
    return None


def _why_indivisible(losses: Sequence[str], origins: Mapping[str, frozenset[str]]) -> str | None:
    """Return why losses and statistics, by what they are made of, cannot be left to half of the ranks each."""
    of_both = [name for name, networks in origins.items() if len(networks) > 1]
    if of_both:
        return f"{', '.join(of_both)} is made of both"
    if len(frozenset[str]().union(*(origins[f"{name}_loss"] for name in losses))) < len(NETWORKS):
        return "no loss is made of one of them"
    return None
