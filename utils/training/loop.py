"""The one training loop: budget, learning rate, clipping, averaging over ranks, finite check, log, checkpoint."""
import errno
import math
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from utils.runtime.errors import UserError, is_out_of_memory
from utils.runtime.files import write_csv, write_torch
from utils.runtime.foreign_arrays import check_sums
from utils.runtime.progress import StageBar, announce
from utils.runtime.ranks import Ranks
from utils.training.draws import seed_step

CHECK_STEPS = 50  # the device is asked for the loss, and whether all was finite, once per this many steps
SAVE_SECONDS = 300  # the state is saved after each validation, and this long after the last time
ROWS = 100  # of the log
WARM_UP, FLAT = 0.02, 0.6  # parts of a training run: the learning rate rises from zero, stays, and falls along a cosine
PROGRESS = ("step", "seconds", "best", "best_step", "waited", "log", "notes")  # attributes of a training run that are saved


class Budget:
    """How much of a training run is done: by the clock, or by updates.

    By the clock a run ends on time whatever else the machine does; by updates it can be repeated exactly.

    Args:
        minutes: of computing, over all continuations; 0: by updates.
        steps: updates in all, where minutes is 0.
    """

    def __init__(self, minutes: float = 0.0, steps: int = 0) -> None:
        self.minutes, self.steps = minutes, steps

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`90min` or `150000steps`. Raises UserError where `text` is neither."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?min|(\d+) ?steps", text)
        if not found or float(found[1] or found[2]) <= 0:
            raise UserError(f"training.length: '{text}' is not a length; write minutes (90min) or updates (150000steps)")
        return cls(float(found[1] or 0), int(found[2] or 0))

    def count(self, step: int, seconds: float, parts: int) -> int:
        """How many of that many equal parts of the training are complete."""
        if self.minutes:
            return int(min(1.0, seconds / (60 * self.minutes)) * parts)
        return min(step, self.steps) * parts // self.steps


@dataclass
class Training:
    """A training run, and everything of it that is saved and restored."""

    name: str  # for its progress bar
    state_file: Path  # to continue from
    log_file: Path  # CSV
    ranks: Ranks
    budget: Budget
    optimizer: torch.optim.Optimizer  # of the networks that are trained
    parts: Mapping[str, Any]  # what else is saved, by name: whatever has state_dict and load_state_dict
    clip: Sequence[tuple[nn.Module, float]]  # networks whose gradients are clipped, each by its own norm; the largest norm
    images: int  # of a step, on all ranks together
    seed: int = 0  # of what a step draws (dropout), so that a continued run draws the same
    rows: int = ROWS  # of the log, over the whole training
    early_stop: int = 0  # stop after that many validations without a better score; 0: never
    summed: Mapping[str, torch.Tensor] = field(default_factory=dict)  # in which each rank gathers its share; saved as their sum
    fix: str = "begin with a lower learning rate under another name"  # where the loss is not finite any more
    scheduler: Any = None  # of the learning rate; the loop's own by default
    steps_at_validations: bool = False  # when the scheduler is stepped; else at each update

    def __post_init__(self) -> None:
        self.step, self.seconds = 0, 0.0  # updates done, and the time they took
        self.best, self.best_step, self.waited = -math.inf, 0, 0  # the highest score, when, and validations since
        self.log: list[dict[str, float]] = []  # its rows
        self.notes: dict[str, Any] = {}  # what else to remember
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)  # loss, gradient norm and steps since a row
        self.finite = torch.ones((), dtype=torch.bool, device=self.ranks.device)  # all losses and gradients so far
        self.saved = time.monotonic()
        if self.scheduler is None:
            self.scheduler = LambdaLR(self.optimizer, lambda _: flat_then_cosine(self.progress))

    @property
    def progress(self) -> float:
        """The part of the training that is done, 0 .. 1."""
        if self.early_stop and self.waited >= self.early_stop:
            return 1.0
        return self.budget.count(self.step, self.seconds, 10**9) / 10**9

    def restore(self) -> bool:
        """Continue from the saved state, if there is one. Raises UserError where it is damaged or of another version."""
        if not self.state_file.is_file():
            return False
        try:
            with zipfile.ZipFile(self.state_file) as archive:
                check_sums(archive, archive.namelist())  # torch checks none
            state = torch.load(self.state_file, map_location=self.ranks.device, weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            progress = state["progress"]
            if self.ranks.is_main:  # the sums are whole there; the other ranks add to them
                for name, tensor in self._summed().items():
                    tensor.copy_(state["summed"][name])
            for name in PROGRESS:
                setattr(self, name, progress[name])
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, LookupError, ValueError, TypeError,
                AttributeError) as error:
            of_system = isinstance(error, OSError) and error.errno != errno.EINVAL  # which torch raises for a file that was cut
            if of_system or is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0][:100]
            raise UserError(f"{self.state_file}: is damaged, or of an earlier version ({type(error).__name__}: {reason}); "
                            "delete it, and the run begins anew") from None
        if self.ranks.is_main:
            self._write_log()
        self.ranks.print(f"continues after step {self.step}, {self.seconds / 60:.1f} minutes")
        return True

    def save(self) -> None:
        """Save everything; all ranks call it at once."""
        self._gather()
        if self.ranks.is_main:
            self._write_log()  # before the state: a run that has ended has its whole log
            write_torch(self.state_file, {
                **{name: part.state_dict() for name, part in self._parts().items()}, "summed": self._summed(),
                "progress": {name: getattr(self, name) for name in PROGRESS}})
        self.saved = time.monotonic()

    def run(self, batches: Callable[[int], Iterator[tuple]], loss: nn.Module, validate: Callable[[], Mapping[str, float]],
            validations: int, until: float = 1.0, keep: Callable[[], None] = lambda: None,
            after_step: Callable[[], None] = lambda: None) -> None:
        """Train until that part of the budget is done.

        Args:
            batches: the first step -> this rank's share of that step's batch, and of those after it.
            loss: (*batch) -> the loss, a scalar; a module that holds the networks which it trains.
            validate: called on rank 0 at the end of each of the `validations` parts of the budget; gives columns of the
                log, among them `score`, the higher the better.
            keep: called on rank 0 where the score is the best so far.
            after_step: called after each update.
        Raises:
            UserError: the loss or its gradient is not finite any more; the saved state is from before.
        """
        if self.progress >= until:
            return
        if not self.state_file.is_file():
            self.save()
        self.ranks.barrier()
        replica = self.ranks.replicated(loss)
        clock, first_step, since = time.monotonic() - self.seconds, self.step, (self.step, time.monotonic())
        self._announce(until)
        with StageBar(total=100, initial=100 * self.progress, unit="%", disable=not self.ranks.is_main, desc=self.name,
                  bar_format="{desc}: {n:.1f}% |{bar}| {elapsed}<{remaining}{postfix}", mininterval=1) as bar:
            for batch in batches(self.step):
                self._update(replica, batch)
                before = self.step, self.seconds
                self.step += 1
                after_step()
                if self.step == first_step + 1:
                    clock = time.monotonic() - self.seconds  # the first step may compile, and does not count
                self.seconds = self._agreed(time.monotonic() - clock)
                if not self.steps_at_validations:
                    self.scheduler.step()
                if self.step % CHECK_STEPS == 0:
                    bar.set_postfix_str(f" loss {self._check_finite():.4f}")

                validation_is_due = self._crossed(validations, before) or self.progress >= 1
                if validation_is_due or self._crossed(self.rows, before) or self.progress >= until:
                    self._check_finite(weights_too=validation_is_due)
                    rate = (self.step - since[0]) * self.images / (time.monotonic() - since[1])
                    self._report(rate, self._validate(validate, keep) if validation_is_due else {})
                    row = ", ".join(f"{name} {value:.4g}" for name, value in self.log[-1].items())
                    bar.set_postfix_str(" " + row)
                    if validation_is_due and self.ranks.is_main:
                        bar.write(row)
                    since = self.step, time.monotonic()
                bar.update(max(0.0, 100 * self.progress - bar.n))
                if validation_is_due or self.progress >= until or self._save_is_due():
                    self._check_finite(weights_too=True)
                    self.save()
                if self.progress >= until:
                    break

    def _announce(self, until: float) -> None:
        """What is left of the budget, and the room for the state (written anew beside the last one) and the weights."""
        left = (until - self.progress) * (self.budget.minutes or self.budget.steps)
        weights = sum(weight.nbytes for group in self.optimizer.param_groups for weight in group["params"])
        moments = 0 if self.optimizer.state else 2 if "betas" in self.optimizer.defaults else 1  # that the state is still without
        if self.ranks.is_main:
            size = 2 * (self.state_file.stat().st_size + moments * weights + weights)
            announce(self.name, left, "minutes" if self.budget.minutes else "updates", self.log_file.parent, size / left, files=4)

    def _update(self, loss: nn.Module, batch: tuple) -> None:
        seed_step(self.seed, self.step, self.ranks.rank)
        value = loss(*batch)
        self.optimizer.zero_grad()
        value.backward()
        norms = torch.stack([nn.utils.clip_grad_norm_(network.parameters(), largest).to(value.device)  # 0 lies on the CPU
                             for network, largest in self.clip])
        self.optimizer.step()
        self.finite &= value.isfinite() & norms.isfinite().all()
        self.totals += torch.stack([value.detach().double(), norms.norm().double(), self.totals.new_ones(())])

    def _gather(self) -> None:
        """Sum what is summed over the ranks: rank 0 holds the sum, the others start again from zero."""
        if self.ranks.world_size > 1:
            for tensor in self._summed().values():
                dist.all_reduce(tensor)
                if not self.ranks.is_main:
                    tensor.zero_()

    def _validate(self, validate: Callable[[], Mapping[str, float]], keep: Callable[[], None]) -> dict[str, float]:
        self._gather()
        columns = dict(self.ranks.from_main(validate))
        score = columns.pop("score")
        self.waited += 1
        if score > self.best:
            self.best, self.best_step, self.waited = score, self.step, 0
            if self.ranks.is_main:
                keep()
        return columns | {"score": score}

    def _report(self, rate: float, columns: dict[str, float]) -> None:
        """Add a row to the log and, after a validation, step a schedule that goes by validations."""
        score = columns.pop("score", None)
        loss, _, steps = self.ranks.sum(self.totals)
        self.log.append({"step": self.step, "minutes": self.seconds / 60, "loss": loss / steps,
                         "learning_rate": self.optimizer.param_groups[0]["lr"], "images_per_second": rate, **columns})
        self.totals.zero_()
        if self.steps_at_validations and score is not None:
            self.scheduler.step(*([score] if isinstance(self.scheduler, ReduceLROnPlateau) else []))

    def _write_log(self) -> None:
        names = list(dict.fromkeys(name for row in self.log for name in row)) or ["step"]
        write_csv(self.log_file, names, [[row.get(name) for name in names] for row in self.log])

    def _crossed(self, parts: int, before: tuple[int, float]) -> bool:
        return self.budget.count(self.step, self.seconds, parts) > self.budget.count(*before, parts)

    def _save_is_due(self) -> bool:
        """Of several ranks all must agree, for which the device is waited for: they ask now and then only."""
        return ((self.ranks.world_size == 1 or self.step % CHECK_STEPS == 0)
                and self.ranks.agree(time.monotonic() - self.saved > SAVE_SECONDS))

    def _check_finite(self, weights_too: bool = False) -> float:
        """The mean loss since the last row: the one place between rows that waits for the device.

        Args:
            weights_too: check what is about to be saved or validated besides: weights may overflow though no gradient did.
        Raises:
            UserError: on all ranks alike, where the loss, a gradient or a weight is not finite any more.
        """
        finite = self.finite
        if weights_too:
            networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            finite = torch.stack([finite, *(tensor.isfinite().all() for network in networks
                                            for tensor in network.state_dict().values())]).all()
        loss, _, steps, faults = self.ranks.sum(torch.cat([self.totals, (~finite).double()[None]]))
        if faults:
            raise UserError(f"{self.state_file}: is from before step {self.step}, where the loss or its gradient is not finite "
                            f"any more; run again with training.precision=fp32, or {self.fix}")
        return loss / max(steps, 1)

    def _agreed(self, seconds: float) -> float:
        """Rank 0's clock: all ranks must do the same."""
        if self.ranks.world_size == 1 or not self.budget.minutes:
            return seconds
        return self.ranks.sum([seconds if self.ranks.is_main else 0.0])[0]

    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, **self.parts}

    def _summed(self) -> dict[str, torch.Tensor]:
        return {"totals": self.totals, **self.summed}


def flat_then_cosine(progress: float) -> float:
    """The learning rate as a part of its highest: warm-up, flat, cosine to zero."""
    if progress < FLAT:
        return min(1.0, progress / WARM_UP)
    return (1 + math.cos(math.pi * (progress - FLAT) / (1 - FLAT))) / 2
