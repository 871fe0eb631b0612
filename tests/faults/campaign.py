"""Every stage killed, starved and disturbed, every input changed or hostile: what is lost, what is wrong? `make faults`.

    python -m tests.faults.campaign [kills of each stage, default 20] [parts: stages, upstream, hostile, mutated, command-line]
                                    [--write] [--quick]

Each trial runs in a fork of this process, whose libraries are loaded (those of command-line excepted), on the chain of stages.py.
--write puts the table into docs/reliability.md; --quick is the part that `make test` runs.
"""
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import disturbances, hostile, ranks, upstream
from tests.faults.judging import COLUMNS, Result, compared, flaws, show, trial_folder
from tests.faults.processes import Ended
from tests.faults.stages import STAGES, Stage, chain
from utils.runtime.errors import ROOT

KILLS = 20
DOCUMENT = ROOT / "docs" / "reliability.md"
TITLES = ("lost", "wrong", "tracebacks", "hangs, orphans", "messages not one line", "programs", "crashes", "files outside",
          "over 4 GiB")


@dataclass(frozen=True)
class Fault:
    """A disturbance of every stage: how often, how it may end, and from (n, whole: the undisturbed run) what is done."""

    times: int
    codes: tuple[int, ...]
    prepare: Callable[[int, Ended], Callable[[], object]] = lambda n, whole: lambda: None
    sent: signal.Signals | None = None


def faults(kills: int) -> dict[str, Fault]:
    few, half = min(8, max(2, kills)), (kills + 1) // 2
    return {
        "SIGKILL": Fault(kills, (-9, 0), sent=signal.SIGKILL),
        "SIGTERM": Fault(half, (143, 0), sent=signal.SIGTERM),
        "SIGINT": Fault(half, (130, 0), sent=signal.SIGINT),
        "killed before a rename": Fault(few, (-9, 0), lambda n, whole: disturbances.at_rename(n + 1, after=False)),
        "killed after a rename": Fault(few, (-9, 0), lambda n, whole: disturbances.at_rename(n + 1, after=True)),
        "full disk": Fault(min(4, few), (2, 0), lambda n, whole: disturbances.full_disk(n + 1)),
        "files limited in size": Fault(min(5, few), (2, 0), lambda n, whole: disturbances.small_files(3000 * 5**n)),
        "read-only output": Fault(1, (2,), lambda n, whole: disturbances.read_only),
        "memory: an allocation fails": Fault(kills, (2, 0), lambda n, whole: disturbances.out_of_memory(
            random.random(), calls_of(whole), disturbances.MESSAGES[n % 2])),
        "memory: limited": Fault(min(4, few), (2, 0), lambda n, whole: disturbances.little_memory(2**(21 + 2 * n))),
    }


# ---- stages ----------------------------------------------------------------------------------------------------------

def calls_of(whole: Ended) -> int:
    return int(re.findall(r"calls: (\d+)", whole.printed)[-1])


def counted() -> Callable[[], None]:
    calls = disturbances.profile()
    return lambda: print(f"calls: {calls[0]}")


def stage_trials(before: Path, name: str, stage: Stage, kills: int) -> Iterator[Result]:
    with trial_folder(before) as folder:
        whole = stage.run(folder, prepare=counted)
        reference = stage.made(folder)
    assert whole.code == 0 and reference, (name, whole)
    for fault, about in faults(kills).items():
        for number in range(about.times):
            with trial_folder(before) as folder:
                moment = random.uniform(0.0, whole.seconds)
                disturbed = stage.start(folder, prepare=about.prepare(number, whole)).wait(about.sent, moment)
                again = stage.run(folder)
                bad = flaws(disturbed, about.codes) + flaws(again, (0,)) + compared(reference, stage.made(folder))
                bad["lost"] += len(list((folder / "out").rglob("*.part")))
                yield name, fault, show(bad, f"{name}, {fault} {number} at {moment:.2f}", disturbed, again)
    with trial_folder(before) as folder:
        other = stage.run(folder, *stage.other)
        other_reference = stage.made(folder)
    assert other.code == 0 and other_reference, (name, other)
    for number in range((kills + 3) // 4):
        for fault, settings, expected in (("two at once", (), reference), ("two at once, other settings", stage.other,
                                                                           other_reference)):
            with trial_folder(before) as folder:
                first = stage.start(folder)
                time.sleep(random.choice([0, random.uniform(0, whole.seconds)]))
                second = stage.start(folder, *settings).wait()
                ended = [first.wait(), second]
                bad = flaws(ended[0]) + flaws(ended[1])
                for made, wanted in (((), reference), (settings, expected)):
                    ended.append(stage.run(folder, *made))
                    bad += flaws(ended[-1])
                    if ended[-1].code == 0:
                        bad += compared(wanted, stage.made(folder))
                bad["lost"] += all(command.code for command in ended[2:])
                yield name, fault, show(bad, f"{name}, {fault} {number}", *ended)


# ---- all -------------------------------------------------------------------------------------------------------------

def table(results: list[Result]) -> str:
    lines = [f"| stage | fault | times | {' | '.join(TITLES)} |", "|---" * (3 + len(TITLES)) + "|"]
    for key in dict.fromkeys((stage, fault) for stage, fault, _ in results):
        rows = [bad for stage, fault, bad in results if (stage, fault) == key]
        counts = [sum(bool(row[column]) for row in rows) for column in COLUMNS]
        lines.append("| " + " | ".join(map(str, (*key, len(rows), *counts))) + " |")
    return "\n".join(lines) + "\n"


def write_table(text: str, command: str) -> None:
    document = DOCUMENT.read_text()
    begin = document.index("| stage | fault |")
    end = re.compile(r"\n(?!\|)").search(document, begin).end()
    DOCUMENT.write_text(document[:begin] + text + document[end:])


def main() -> None:
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    kills = int(next(filter(str.isdigit, sys.argv[1:]), 1 if "--quick" in options else KILLS))
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--") and not argument.isdigit()]
    random.seed(0)
    os.umask(0o022)
    results, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        folders = chain(Path(folder))
        parts = {name: (lambda name=name: stage_trials(folders[name], name, STAGES[name], kills)) for name in STAGES}
        parts |= {"ranks": lambda: itertools.chain.from_iterable(
                      ranks.trials(folders[name], name, max(2, kills // 4)) for name in STAGES if STAGES[name].ranks),
                  "upstream": lambda: upstream.trials(folders),
                  "hostile": lambda: hostile.trials(folders), "mutated": lambda: hostile.mutated(folders, 3 if kills < 5 else 30),
                  "command-line": lambda: hostile.command_line(folders)}
        for name, trials in parts.items():
            if name in wanted or not wanted and ("--quick" not in options or name not in ("ranks", "command-line")):
                results += trials()
                print(f"{name}: {len(results)} trials so far, {time.monotonic() - begun:.0f} s", flush=True)
    text = table(results)
    print(text)
    bad = sum(bool(row.total()) for *_, row in results)
    print(f"{len(results)} trials, {bad} of them bad, {(time.monotonic() - begun) / 60:.1f} minutes")
    if "--write" in options:
        write_table(text, "")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
