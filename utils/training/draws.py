"""What a training step draws: batch, noise and dropout, the same however many ranks share it and whenever it is run."""
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch

from utils.runtime.ranks import Ranks


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a step draws (dropout), so that a continued run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


class Draws:
    """The random draws of one step, the same however many ranks share the step's batch and however often it is resumed.

    Every rank draws for the whole batch, on the CPU, and keeps its own share.
    """

    def __init__(self, seed: int, step: int, batch: int, ranks: Ranks) -> None:
        self.generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
        self.batch, self.ranks = batch, ranks

    def normal(self, *shape: int) -> torch.Tensor:
        return self._mine(torch.randn(self.batch, *shape, generator=self.generator))

    def uniform(self) -> torch.Tensor:
        return self._mine(torch.rand(self.batch, generator=self.generator))

    def uniform_on_host(self) -> np.ndarray:
        """What `uniform` would give, for the host's own choices: fetching it back would wait for the step before."""
        return torch.rand(self.batch, generator=self.generator)[self.ranks.rank :: self.ranks.world_size].numpy()

    def integers(self, high: int) -> torch.Tensor:
        return self._mine(torch.randint(high, (self.batch,), generator=self.generator))

    def _mine(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.ranks.rank :: self.ranks.world_size].to(self.ranks.device, non_blocking=True)


def batch_rows(items: int, batch: int, seed: int, step: int, ranks: Ranks) -> np.ndarray:
    """This rank's share of the items of a step: every item once an epoch, in a new order each epoch.

    Where an epoch ends within a batch, the next one begins there.
    """
    places = np.arange(step * batch, (step + 1) * batch)[ranks.rank :: ranks.world_size]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(items) for epoch in np.unique(places // items)}
    return np.array([orders[place // items][place % items] for place in places])


def drawn_batches(items: int, batch: int, seed: int, ranks: Ranks,
                  make: Callable[[Draws, np.ndarray], tuple]) -> Callable[[int], Iterator[tuple]]:
    """What Training.run takes: from a step on, for each step what `make(its draws, this rank's share of the items)` gives."""
    def batches(first: int) -> Iterator[tuple]:
        for step in count(first):
            yield make(Draws(seed, step, batch, ranks), batch_rows(items, batch, seed, step, ranks))
    return batches
