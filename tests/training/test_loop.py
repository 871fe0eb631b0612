"""The training loop on a network of some numbers: what is spent, drawn, logged, saved and restored."""
import csv
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

from tests.running import Killed
from utils.runtime import errors
from utils.runtime.errors import Terminated, UserError
from utils.runtime.files import write_torch
from utils.runtime.ranks import Ranks
from utils.training import loop
from utils.training.draws import Draws, batch_rows, seed_step
from utils.training.loop import Budget, Training, flat_then_cosine

ALONE = Ranks(0, 1, torch.device("cpu"))
ITEMS, BATCH = 24, 5
generator = torch.Generator().manual_seed(0)
X = torch.randn(ITEMS, 4, generator=generator)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.1 * torch.randn(ITEMS, 1, generator=generator)


class Loss(nn.Module):
    """The squared error of a linear map of inputs that are dropped out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.network(F.dropout(x, 0.2)), y)


class Session:
    """One process that trains; `scores` are those of the validations, by default minus the loss over all items."""

    def __init__(self, folder: Path, budget: Budget, optimizer: type = torch.optim.Adam, scores: list[float] | None = None,
                 scheduler: Callable | None = None, clip: float = 1.0, **settings) -> None:
        torch.manual_seed(0)
        self.network, self.scores = nn.Linear(4, 1), scores
        self.loss = Loss(self.network)
        self.seen = torch.zeros(ITEMS)  # how often each item was shown since the last validation
        self.kept, self.validated, self.seen_at_validations = [], [], []
        optimizer = optimizer(self.network.parameters(), 0.05)
        self.training = Training("test", folder / "state.pt", folder / "log.csv", ALONE, budget, optimizer,
                                 {"network": self.network}, clip=[(self.network, clip)], images=BATCH, seed=3,
                                 summed={"seen": self.seen}, scheduler=scheduler and scheduler(optimizer), **settings)

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            rows = batch_rows(ITEMS, BATCH, 3, step, ALONE)
            for row in rows:
                self.seen[row] += 1
            yield X[rows], Y[rows]
            step += 1

    def validate(self) -> dict[str, float]:
        self.validated.append(self.training.step)
        self.seen_at_validations.append(self.seen.tolist())
        self.seen.zero_()
        with torch.no_grad():
            score = -F.mse_loss(self.network(X), Y).item()
        return {"fdr": 7.0, "score": score if self.scores is None else self.scores[len(self.validated) - 1]}

    def keep(self) -> None:
        self.kept.append((self.training.step, self.training.best))

    def run(self, validations: int = 3, killed_at: int | None = None, **arguments) -> "Session":
        """Restore and train; killed after that update."""
        def after_step() -> None:
            if self.training.step == killed_at:
                raise Killed
        self.training.restore()
        try:
            self.training.run(self.batches, self.loss, self.validate, validations, keep=self.keep, after_step=after_step,
                              **arguments)
        except Killed:
            assert killed_at is not None
        else:
            assert killed_at is None
        return self


def log(folder: Path, *columns: str) -> list[tuple]:
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


# ---- the budget ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, minutes, steps", [
    ("90min", 90.0, 0), ("90 min", 90.0, 0), ("0.5min", 0.5, 0), ("150000steps", 0.0, 150000), ("1 steps", 0.0, 1)])
def test_a_length_is_minutes_or_steps(text, minutes, steps):
    budget = Budget.parse(text)
    assert (budget.minutes, budget.steps) == (minutes, steps)


@pytest.mark.parametrize("text", ["", "90", "min", "0min", "0.0min", "0steps", "-5min", "1.5steps", "90minutes", "1e3steps",
                                  "nanmin", "90min 3steps", "90min\n", "90MIN"])
def test_what_is_no_length_is_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        Budget.parse(text)
    assert str(error.value) == (f"training.length: '{text}' is not a length; write minutes (90min) or updates (150000steps)")


@pytest.mark.parametrize("steps, parts", [(10, 5), (7, 3), (3, 100), (150_000, 100), (49, 10**9)])
def test_parts_are_complete_exactly_at_their_last_step(steps, parts):
    budget = Budget(steps=steps)
    for step in {0, 1, steps // parts, steps // 2, steps // 2 + 1, steps - 1, steps}:
        complete = budget.count(step, 0.0, parts)  # in whole numbers: complete / parts <= step / steps < (complete + 1) / parts
        assert complete * steps <= step * parts < (complete + 1) * steps
    assert budget.count(steps, 0.0, parts) == budget.count(steps + 1, 0.0, parts) == parts


def test_parts_by_the_clock():
    budget = Budget(minutes=2.0)
    found = [budget.count(10**6, seconds, 4) for seconds in (0, 29.9, 30, 59.9, 60, 119.9, 120, 500)]
    assert found == [0, 0, 1, 1, 2, 3, 4, 4]


# ---- what a step draws -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world_size", [1, 2])
def test_every_item_is_seen_once_an_epoch(world_size):
    seen = [batch_rows(10, 4, 3, step, Ranks(rank, world_size, torch.device("cpu")))
            for step in range(5) for rank in range(world_size)]
    seen = np.stack(seen).reshape(5, world_size, -1).transpose(0, 2, 1).reshape(-1)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    other = np.concatenate([batch_rows(10, 4, 4, step, ALONE) for step in range(5)])
    assert other[:10].tolist() != seen[:10].tolist()


def test_a_batch_larger_than_the_data_goes_through_several_epochs():
    rows = batch_rows(3, 9, 0, 0, ALONE)
    assert rows.shape == (9,) and np.bincount(rows).tolist() == [3, 3, 3]
    assert all(sorted(rows[k : k + 3]) == [0, 1, 2] for k in (0, 3, 6))


def test_ranks_share_the_draws_of_a_step():
    whole = Draws(1, 7, 6, ALONE)
    parts = [Draws(1, 7, 6, Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for draw in (lambda draws: draws.normal(2, 3), lambda draws: draws.uniform(), lambda draws: draws.integers(1000)):
        expected, (a, b) = draw(whole), (draw(part) for part in parts)
        assert torch.equal(expected[0::2], a) and torch.equal(expected[1::2], b)


def test_draws_and_seeds_differ_by_seed_step_and_rank():
    same = Draws(1, 7, 6, ALONE).normal(3)
    assert torch.equal(Draws(1, 7, 6, ALONE).normal(3), same)
    assert not torch.equal(Draws(2, 7, 6, ALONE).normal(3), same) and not torch.equal(Draws(1, 8, 6, ALONE).normal(3), same)
    drawn = []
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        seed_step(*key)
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[4] and len({tuple(pair) for pair in drawn}) == 4


# ---- a run -----------------------------------------------------------------------------------------------------------

def test_the_log_has_its_rows_at_equal_parts_and_the_mean_loss_between_them(tmp_path):
    session = Session(tmp_path, Budget(steps=12), rows=4)
    losses = []
    hook = session.loss.register_forward_hook(lambda module, inputs, output: losses.append(output.item()))
    session.run(validations=2)
    hook.remove()
    rows = log(tmp_path, "step", "loss", "fdr")
    assert [(int(step), fdr) for step, _, fdr in rows] == [(3, ""), (6, "7.0"), (9, ""), (12, "7.0")]
    means = np.array(losses).reshape(4, 3).mean(axis=1)
    np.testing.assert_allclose([float(loss) for _, loss, _ in rows], means, rtol=1e-6)
    assert session.validated == [6, 12]
    assert [sum(seen) for seen in session.seen_at_validations] == [30, 30]  # six steps of five items each
    assert log(tmp_path, "learning_rate")[-1] == ("0.0",)  # flat, then a cosine to zero
    with pytest.raises(KeyError):
        log(tmp_path, "score")


def test_the_learning_rate_follows_the_progress(tmp_path):
    rates = [flat_then_cosine(progress) for progress in (0, 0.01, 0.02, 0.59, 0.8, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    Session(tmp_path, Budget(steps=100), rows=100).run()
    found = [float(rate) for rate, in log(tmp_path, "learning_rate")]
    assert found == pytest.approx([0.05 * flat_then_cosine(step / 100) for step in range(1, 101)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Session]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, Session(folder, Budget(steps=30), rows=6).run()


@pytest.mark.parametrize("killed_at", [1, 7, 10, 19, 29, 30])
def test_killed_and_continued_it_is_the_same_training(undisturbed, tmp_path, killed_at):
    reference_folder, reference = undisturbed
    killed = Session(tmp_path, Budget(steps=30), rows=6).run(killed_at=killed_at)
    assert killed.training.step == killed_at
    session = Session(tmp_path, Budget(steps=30), rows=6)
    session.network.weight.data.zero_()  # as from another start: everything is restored
    session.run()
    assert session.training.step == 30 and torch.equal(session.network.weight, reference.network.weight)
    assert torch.equal(session.network.bias, reference.network.bias)
    columns = ("step", "loss", "learning_rate", "fdr")
    assert log(tmp_path, *columns) == log(reference_folder, *columns) and len(log(tmp_path, "step")) == 6
    assert (session.training.best, session.training.best_step) == (reference.training.best, reference.training.best_step)
    validations = [step for step in (10, 20, 30) if step > (killed_at - 1) // 10 * 10]
    assert session.validated == validations
    assert session.seen_at_validations == reference.seen_at_validations[-len(validations):]


def test_killed_between_rows_it_is_the_same_training(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)  # the state is saved after each step, with part of a row's losses in it
    for killed_at in (4, 13, 22):
        Session(tmp_path, Budget(steps=30), rows=6).run(killed_at=killed_at)
        assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == killed_at - 1
    session = Session(tmp_path, Budget(steps=30), rows=6).run()
    assert torch.equal(session.network.weight, undisturbed[1].network.weight)
    for columns in (("step", "learning_rate", "fdr"), ("loss",)):
        assert log(tmp_path, *columns) == log(undisturbed[0], *columns)
    assert session.seen_at_validations == undisturbed[1].seen_at_validations[-1:]


def test_the_log_on_disk_is_the_state_s(undisturbed, tmp_path):
    Session(tmp_path, Budget(steps=30), rows=6).run(killed_at=17)
    (tmp_path / "log.csv").write_text("step\n15\n")  # killed between the two
    session = Session(tmp_path, Budget(steps=30), rows=6)
    assert session.training.restore() and session.training.step == 10
    assert log(tmp_path, "step", "loss") == log(undisturbed[0], "step", "loss")[:2]
    assert not Session(tmp_path / "new", Budget(steps=30)).training.restore()


@pytest.mark.parametrize("lost", ["the state", "the log"])
def test_killed_between_the_two_files_nothing_is_missing_after_a_rerun(undisturbed, tmp_path, monkeypatch, lost):
    """The last state is saved and the process killed before, or after, the rename of either file."""
    name = "write_torch" if lost == "the state" else "write_csv"
    write = getattr(loop, name)

    def killed_at_the_end(*arguments) -> None:
        if session.training.step == 30:
            raise Killed
        write(*arguments)
    monkeypatch.setattr(loop, name, killed_at_the_end)
    session = Session(tmp_path, Budget(steps=30), rows=6)
    with pytest.raises(Killed):
        session.training.run(session.batches, session.loss, session.validate, 3)
    monkeypatch.undo()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == 20  # the log is never behind the state
    session = Session(tmp_path, Budget(steps=30), rows=6).run()
    assert torch.equal(session.network.weight, undisturbed[1].network.weight)
    assert log(tmp_path, "step", "loss") == log(undisturbed[0], "step", "loss")


@pytest.mark.parametrize("sent, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_the_last_saved_state_and_the_training_goes_on(undisturbed, tmp_path, monkeypatch, capsys, sent, error):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(errors._Signals, "stopped_by", None)
    before = {number: signal.getsignal(number) for number in errors.STOPS}
    try:
        errors.listen()
        session = Session(tmp_path, Budget(steps=30), rows=6)
        session.loss.register_forward_hook(lambda *_: os.kill(os.getpid(), sent) if session.training.step == 17 else None)
        with pytest.raises(error):
            session.training.run(session.batches, session.loss, session.validate, 3)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err.endswith("\n")  # the bar's line is closed before another is printed
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == 10
    assert torch.equal(Session(tmp_path, Budget(steps=30), rows=6).run().network.weight, undisturbed[1].network.weight)


def test_a_finished_training_writes_a_lost_log_again(tmp_path):
    Session(tmp_path, Budget(steps=6)).run()
    rows = log(tmp_path, "step", "loss")
    (tmp_path / "log.csv").unlink()
    Session(tmp_path, Budget(steps=6)).run()
    assert log(tmp_path, "step", "loss") == rows and len(rows) == 6


def test_a_finished_training_does_nothing_more(tmp_path):
    Session(tmp_path, Budget(steps=6)).run()
    before = (tmp_path / "state.pt").read_bytes()
    again = Session(tmp_path, Budget(steps=6)).run()
    assert again.training.progress == 1 and again.validated == [] and (tmp_path / "state.pt").read_bytes() == before
    longer = Session(tmp_path, Budget(steps=9)).run()  # its budget may be raised
    assert longer.training.step == 9 and longer.validated == [9]  # the first two thirds were done


def test_two_phases_share_one_training(tmp_path):
    session = Session(tmp_path, Budget(steps=20)).run(validations=4, until=0.5)
    assert session.training.step == 10 and session.validated == [5, 10]
    killed = Session(tmp_path, Budget(steps=20)).run(validations=4, until=0.5)  # nothing is left of the first phase
    assert killed.training.step == 10 and killed.validated == []
    killed.run(validations=4)
    assert killed.training.step == 20 and killed.validated == [15, 20]


def test_gradients_are_clipped_by_their_norm(tmp_path):
    session = Session(tmp_path, Budget(steps=1), torch.optim.SGD, clip=1e-3,
                      scheduler=lambda optimizer: MultiStepLR(optimizer, [9]))
    before = torch.cat([weight.detach().clone().ravel() for weight in session.network.parameters()])
    session.run()
    after = torch.cat([weight.detach().ravel() for weight in session.network.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.05 * 1e-3, rel=1e-3)


# ---- the best one, and stopping early --------------------------------------------------------------------------------

def test_the_best_is_kept_whenever_there_is_a_better_one(tmp_path):
    session = Session(tmp_path, Budget(steps=10), scores=[0.1, 0.5, 0.5, 0.4, 0.6]).run(validations=5)
    assert session.kept == [(2, 0.1), (4, 0.5), (10, 0.6)]
    assert (session.training.best, session.training.best_step, session.training.waited) == (0.6, 10, 0)


def test_it_stops_after_so_many_validations_without_a_better_score(tmp_path):
    scores = [0.2, 0.5, 0.4, 0.5, 0.9]
    session = Session(tmp_path, Budget(steps=10), scores=scores, early_stop=2).run(validations=5)
    assert session.training.step == 8 and session.training.progress == 1 and session.kept == [(2, 0.2), (4, 0.5)]
    again = Session(tmp_path, Budget(steps=10), scores=scores, early_stop=2).run(validations=5)
    assert again.training.step == 8 and again.validated == []  # and stays stopped
    never = Session(tmp_path / "never", Budget(steps=10), scores=scores, early_stop=0).run(validations=5)
    assert never.training.step == 10 and never.kept[-1] == (10, 0.9)


@pytest.mark.parametrize("scheduler, rates", [
    (lambda optimizer: MultiStepLR(optimizer, [2, 4], 0.1), [0.05, 0.05, 0.005, 0.005, 0.0005]),
    (lambda optimizer: ReduceLROnPlateau(optimizer, "max", 0.1, patience=1, threshold=0), [0.05, 0.05, 0.05, 0.05, 0.005]),
], ids=["milestones", "plateau"])
def test_a_schedule_by_validations(tmp_path, scheduler, rates):
    settings = dict(scores=[0.2, 0.5, 0.4, 0.5, 0.9], scheduler=scheduler, steps_at_validations=True, rows=5)
    Session(tmp_path, Budget(steps=10), **settings).run(validations=5)
    assert [float(rate) for rate, in log(tmp_path, "learning_rate")] == pytest.approx(rates)
    Session(tmp_path / "k", Budget(steps=10), **settings).run(validations=5, killed_at=7)  # the schedule is restored too
    settings["scores"] = settings["scores"][3:]
    Session(tmp_path / "k", Budget(steps=10), **settings).run(validations=5)
    assert [float(rate) for rate, in log(tmp_path / "k", "learning_rate")] == pytest.approx(rates)


# ---- by the clock ----------------------------------------------------------------------------------------------------

def test_by_the_clock_it_ends_on_time_over_all_continuations(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def session(budget: Budget) -> Session:
        made = Session(tmp_path, budget)
        made.loss.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 6.0))  # a step takes six seconds
        return made

    killed = session(Budget(minutes=1.0)).run(validations=2, killed_at=9)
    assert killed.validated == [6]  # half a minute: the first step, which may compile, does not count
    now[0] += 1e6  # how long it lay
    done = session(Budget(minutes=1.0)).run(validations=2)
    assert done.training.step == 12 and done.validated == [12] and done.training.seconds == pytest.approx(60)
    assert [float(minutes) for minutes, in log(tmp_path, "minutes")][-1] == pytest.approx(1.0)
    rates = [float(rate) for rate, in log(tmp_path, "images_per_second")]
    assert len(rates) == 10 and rates == pytest.approx([BATCH / 6] * 10)  # one a tenth of a minute


# ---- what goes wrong -------------------------------------------------------------------------------------------------

def not_finite(kind: str, network: nn.Linear) -> torch.Tensor:
    if kind == "loss":
        return torch.tensor(math.nan) * network.weight.sum()
    return (0 * network.weight.sum()).sqrt()  # a loss of zero, whose gradient is not finite


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("first, stops_at, saved_at", [(5, 10, 0), (12, 20, 0), (20, 20, 0), (23, 30, 20)])
def test_a_loss_or_gradient_that_is_not_finite_stops_and_the_state_is_from_before(tmp_path, kind, first, stops_at, saved_at):
    session = Session(tmp_path, Budget(steps=40), rows=4, fix="begin with a lower diffusion.learning_rate")
    session.loss.register_forward_hook(lambda module, inputs, output: output if session.training.step < first - 1
                                       else output + not_finite(kind, session.network))
    with pytest.raises(UserError) as error:
        session.run(validations=2)
    assert str(error.value) == (
        f"{tmp_path / 'state.pt'}: is from before step {stops_at}, where the loss or its gradient is not finite any more; run "
        "again with training.precision=fp32, or begin with a lower diffusion.learning_rate")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == saved_at
    assert all(weight.isfinite().all() for weight in state["network"].values())
    assert Session(tmp_path, Budget(steps=40), rows=4).run(validations=2).training.step == 40  # and it can go on


def test_weights_that_overflow_unnoticed_by_the_loss_are_never_saved_logged_or_kept(tmp_path):
    """A buffer, say a batch norm's variance, may become infinite though loss and gradient stay finite."""
    session = Session(tmp_path, Budget(steps=40), rows=8)
    session.network.register_buffer("variance", torch.ones(2))
    def overflow(*_) -> None:
        if session.training.step == 24:
            session.network.variance.fill_(math.inf)
    session.loss.register_forward_pre_hook(overflow)
    with pytest.raises(UserError, match="is from before step 30, "):
        session.run(validations=4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 20 and state["network"]["variance"].tolist() == [1, 1]
    assert log(tmp_path, "step")[-1] == ("20",) and session.validated == [10, 20] and session.kept[-1][0] == 20


def test_the_loss_is_checked_now_and_then_between_rows(tmp_path):
    session = Session(tmp_path, Budget(steps=1000), rows=1)
    session.loss.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(UserError, match=f"from before step {loop.CHECK_STEPS},"):
        session.run(validations=1)


def other_version(data: bytes, folder: Path) -> None:
    write_torch(folder / "state.pt", {"network": nn.Linear(4, 1).state_dict(), "step": 10})


def other_network(data: bytes, folder: Path) -> None:
    state = torch.load(folder / "state.pt", weights_only=True)
    write_torch(folder / "state.pt", state | {"network": nn.Linear(5, 1).state_dict()})


def with_a_flipped_bit(data: bytes, folder: Path) -> None:
    weight = torch.load(folder / "state.pt", weights_only=True)["network"]["weight"].numpy().tobytes()
    state = bytearray(data)
    state[data.index(weight)] ^= 1  # a finite number still
    (folder / "state.pt").write_bytes(state)


def with_code(data: bytes, folder: Path) -> None:
    torch.save(Session(folder / "x", Budget(steps=1)).network, folder / "state.pt")


@pytest.mark.parametrize("damage", [
    *(lambda data, folder, length=length: (folder / "state.pt").write_bytes(data[:length]) for length in (-1, -1500, 100)),
    lambda data, folder: (folder / "state.pt").write_bytes(b""),
    lambda data, folder: (folder / "state.pt").write_bytes(b"no state"),
    lambda data, folder: write_torch(folder / "state.pt", [1, 2]),
    lambda data, folder: write_torch(folder / "state.pt", None),
    other_version, other_network, with_code, with_a_flipped_bit],
    ids=["cut", "half", "start", "empty", "text", "a list", "nothing", "another version", "another network", "code", "a bit"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path, damage):
    Session(tmp_path, Budget(steps=6)).run()
    damage((tmp_path / "state.pt").read_bytes(), tmp_path)
    with pytest.raises(UserError) as error:
        Session(tmp_path, Budget(steps=6)).run()
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'state.pt'}: is damaged, or of an earlier version (") and "\n" not in message
    assert "; delete it, and " in message
