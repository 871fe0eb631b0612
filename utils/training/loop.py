"""What training the autoencoder and training the diffusion model have in common."""
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils.runtime.errors import UserError
from utils.runtime.ranks import Ranks

WARM_UP = 0.02  # of a training: the learning rate rises from zero
HELD_OUT_PART, MOST_HELD_OUT = 25, 200
FLAT = 0.6  # of a training: then the learning rate falls to zero along a cosine


class Budget:
    """How much of a training is done: by the clock, or by steps.

    By the clock a training ends on time whatever else the machine does; by steps it can be repeated exactly.

    Args:
        minutes: of computing, over all continuations; 0: by steps.
        steps: updates in all.
        ranks: all of them go by rank 0's clock.
        step, seconds: what was done before this process began.

    Attributes:
        progress: the part that is done, 0 .. 1, as of the last `go_on`.
    """

    def __init__(self, minutes: float, steps: int, ranks: Ranks, step: int = 0, seconds: float = 0.0) -> None:
        self.minutes, self.steps, self.ranks, self.step = minutes, steps, ranks, step
        self.begin = time.monotonic() - seconds
        self.go_on()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def go_on(self) -> bool:
        """Take the time; whether something is left to do."""
        done = self.seconds / (60 * self.minutes) if self.minutes else self.step / self.steps
        if self.minutes and self.ranks.world_size > 1:
            [done] = self.ranks.sum([done if self.ranks.is_main else 0.0])
        self.progress = min(1.0, done)
        return self.progress < 1

    def exclude(self, begin: float) -> None:
        """Do not count the time since `begin` (time.monotonic()): it was spent on compiling."""
        self.begin += time.monotonic() - begin


def flat_then_cosine(progress: float) -> float:
    """The learning rate as a part of its highest: warm-up, flat, cosine to zero."""
    if progress < FLAT:
        return min(1.0, progress / WARM_UP)
    return (1 + math.cos(math.pi * (progress - FLAT) / (1 - FLAT))) / 2


def warm_restarts(step: int, first: int = 10_000, factor: int = 2) -> float:
    """The learning rate as a part of its highest: cosines to zero, each `factor` times as long (arXiv 1608.03983)."""
    length = first
    while step >= length:
        step, length = step - length, length * factor
    return (1 + math.cos(math.pi * step / length)) / 2


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

    def integers(self, high: int) -> torch.Tensor:
        return self._mine(torch.randint(high, (self.batch,), generator=self.generator))

    def _mine(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.ranks.rank :: self.ranks.world_size].to(self.ranks.device)


def batch_rows(items: int, batch: int, seed: int, step: int, ranks: Ranks) -> np.ndarray:
    """This rank's share of the items of a step: every item once an epoch, in a new order each epoch.

    Where an epoch ends within a batch, the next one begins there.
    """
    places = np.arange(step * batch, (step + 1) * batch)[ranks.rank :: ranks.world_size]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(items) for epoch in np.unique(places // items)}
    return np.array([orders[place // items][place % items] for place in places])


def average_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks."""
    if ranks.world_size > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= ranks.world_size
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class Average:
    """Exponential moving average of a network's weights; the decay grows as 1 - (1 + step)^-power up to its maximum."""

    POWER, MAXIMUM = 0.75, 0.9999

    def __init__(self, network: nn.Module) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.MAXIMUM, 1 - (1 + step) ** -self.POWER)
        current = network.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [current[name] for name in self.weights], 1 - decay)


def held_out(labels: np.ndarray, identities: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Set identities apart that are not trained on, evenly spread.

    Args:
        labels: [N] identity of each face, 0 .. identities - 1.
        number: 0: one in HELD_OUT_PART, at least 2 and at most MOST_HELD_OUT.
    Returns:
        which faces are theirs [N] bool, and the identities [number].
    Raises:
        UserError: fewer than two identities would be held out, or left to train on.
    """
    number = number or min(MOST_HELD_OUT, max(2, identities // HELD_OUT_PART))
    if number < 2 or identities < number + 2:
        raise UserError(f"training.held_out_identities: {number} cannot be set apart from {identities} identities; "
                        + (f"set 2 to {identities - 2}" if identities >= 4 else "give the faces of at least 4 people"))
    chosen = np.arange(number) * identities // number
    return np.isin(labels, chosen), chosen


def check_judge(recogniser: nn.Module, file: str) -> None:
    """Raises UserError where training.recogniser (`file`) gives no gradients, as those in ncnn's format do not."""
    if not hasattr(recogniser, "with_early_features"):
        raise UserError(f"{file}: training needs gradients through the recogniser, which ncnn does not give; set "
                        "training.recogniser to weights in another format")


def check_finite(loss: float, gradient_norm: torch.Tensor, state_file: Path, step: int, setting: str) -> None:
    """Raises UserError where the loss or its gradient is not finite any more; meant to be called before a state is saved."""
    if not (math.isfinite(loss) and torch.isfinite(gradient_norm)):
        raise UserError(f"{state_file}: is from before step {step}, where the loss or its gradient is not finite any more; "
                        f"run again with training.precision=fp32, or begin with a lower {setting} and another training.name")
