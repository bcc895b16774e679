# SPDX-License-Identifier: MIT
"""How ranks share the training of policy and value network: all train both, or half of the ranks train each."""

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
"""Names of the slices that even ranks and odd ranks train."""
MOST_UNEVEN = 1.5
"""Largest ratio of the two networks' parameter counts for "auto": beyond it, half of the ranks would wait."""


class Undivided:
    """All ranks train all networks, each from its own samples.

    Attributes:
        team: the ranks that train the same as this one; gradients are summed over them.
        idle: the slices of parameters that other ranks train in its place.
        others: the losses and statistics that those ranks compute in its place.
    """

    def __init__(self, ranks: Communicator) -> None:
        self.team = ranks
        self.idle: frozenset[str] = frozenset()
        self.others: frozenset[str] = frozenset()

    def minibatch_size(self, of_a_rank: int) -> int:
        """Return how many samples a minibatch of this rank has, given how many each rank contributes."""
        return of_a_rank

    def share(
        self, samples: Batch, orders: Iterable[np.ndarray], size: int, seconds: dict[str, float]
    ) -> tuple[Batch, Iterable[np.ndarray]]:
        """Return all samples that this rank trains on, and their order in each epoch.

        Args:
            samples: this rank's, S of them.
            orders: for each epoch, (S,) indices into them.
            size: samples that each rank contributes to a minibatch.
            seconds: phase name -> seconds; time spent on messages and waiting is added.
        """
        return samples, orders

    def bring_together(
        self, flat: FlatParameters, adam: Adam, means: np.ndarray, seconds: dict[str, float]
    ) -> np.ndarray:
        """Fetch what other ranks have trained in this one's place, after the updates of an iteration.

        Args:
            flat: all parameters; those of `idle`, and their gradients, are overwritten.
            adam: its moments and step count for `idle` are overwritten likewise.
            means: (S,), means of all statistics; NaN for those that this rank does not compute.
            seconds: as in `share`.

        Returns:
            (S,), the means of all statistics; NaN for those that no rank computes.
        """
        return means


class Divided(Undivided):
    """Even ranks train the policy, odd ones the value network, each on its own and its partner's samples.

    Up to the rounding of sums, the updates are those that all ranks would make together: each contains the same
    samples, drawn in the same order. But a rank makes half as many calls, each on twice as many samples, and reduces
    gradients over half of the ranks (with two ranks, not at all).

    Args:
        ranks: an even number of them. Ranks 0 and 1 are partners, 2 and 3, and so on.
        origins: name of a loss or statistic -> the networks that it is computed from, at most one.
    """

    def __init__(self, ranks: Communicator, origins: Mapping[str, frozenset[str]]) -> None:
        own = ranks.rank % 2
        self.team, self.pair = ranks.split(own), ranks.split(ranks.rank // 2)
        self.idle = frozenset({NETWORKS[1 - own]})
        # What depends on neither network is also computed only once, by the policy's ranks.
        of_value = frozenset(name for name, names in origins.items() if "value" in names)
        self.others = of_value if own == 0 else frozenset(origins) - of_value

    def minibatch_size(self, of_a_rank: int) -> int:
        """Return how many samples a minibatch has: those of two ranks."""
        return 2 * of_a_rank

    def share(
        self, samples: Batch, orders: Iterable[np.ndarray], size: int, seconds: dict[str, float]
    ) -> tuple[Batch, Iterable[np.ndarray]]:
        """Return the samples of both partners, and orders in which their minibatches alternate."""
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
        """Fetch the other network from the partner, and return the means of all statistics."""
        partner = 1 - self.pair.rank  # also the index of its network, in NETWORKS and in `slices`
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
        """Wait for the partner, then count the block's time as communication."""
        started = time.perf_counter()
        self.pair.barrier()
        arrived = time.perf_counter()
        seconds["waiting"] += arrived - started
        yield
        seconds["communication"] += time.perf_counter() - arrived

    def _of_both(self, tensor: Tensor) -> Tensor:
        """Return this rank's tensor and its partner's, stacked."""
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
    """Return how ranks share the training, as `config.divide_networks` asks. Collective: call on all ranks.

    Args:
        config: all keywords.
        ranks: the run's.
        networks: policy and value network.
        flat: their parameters.
        losses: names of the losses.
        origins: returns the networks that each loss (as `<name>_loss`) and each statistic is computed from.
        tell: prints a line if `divide_networks=True` is impossible.
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
        except Exception as error:  # from the user's losses, which may not work under a tracer
            why = f"the losses cannot be traced: {error}"
    if ranks.min(float(why is None)) == 1:
        return Divided(ranks, found)
    if wanted is True:
        tell(f"divide_networks: all ranks train both networks ({why or 'another rank cannot'})")
    return Undivided(ranks)


def _alike(flat: FlatParameters) -> bool:
    sizes = [part.stop - part.start for part in flat.slices.values()]
    return max(sizes) <= MOST_UNEVEN * min(sizes)


def _why_not(config: Config, ranks: Communicator, networks: ActorCritic, flat: FlatParameters) -> str | None:
    """Return why the networks cannot be divided, apart from reasons that lie in the losses; None: they can."""
    if ranks.size % 2 == 1:
        return "the number of ranks is odd"
    if sum(part.stop > part.start for part in flat.slices.values()) < 2:
        return "only one of them is trained"
    if config.train_pi_epochs != config.train_v_epochs or config.target_kl > 0:
        return "the policy's updates and the value's may end at different points"
    if any(hook.has("on_update") for hook in config.hooks):
        return "a hook's on_update gets the statistics of both"
    if networks.network_buffers():
        return "they have buffers, which change with a rank's samples"
    return None


def _why_indivisible(losses: Sequence[str], origins: Mapping[str, frozenset[str]]) -> str | None:
    """Return why losses and statistics, given their origins, cannot be divided among the ranks; None: they can."""
    of_both = [name for name, networks in origins.items() if len(networks) > 1]
    if of_both:
        return f"computed from both: {', '.join(of_both)}"
    if len(frozenset[str]().union(*(origins[f"{name}_loss"] for name in losses))) < len(NETWORKS):
        return "one of them has no loss"
    return None
