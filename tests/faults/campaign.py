"""Every stage killed, starved and disturbed, every input changed or hostile: what is lost, what is wrong? `make faults`.

    python -m tests.faults.campaign [kills of each stage] [stages, or ranks, upstream, hostile, mutated, commandline]
                                    [--write] [--quick]

Each trial runs in forks of this process, whose libraries are loaded (commandline excepted), on the chain of stages.py. --write
puts the table into docs/reliability.md; --quick is the part that `make test` runs, some of each.
"""
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

from tests.faults import disturbances, hostile, ranks, upstream
from tests.faults.judging import COLUMNS, Result, Trial, compared, flaws, show, trial_folder
from tests.faults.processes import Ended, end_with_parent
from tests.faults.stages import STAGES, chain
from utils.runtime.errors import ROOT

KILLS = 20
# The parts, and the share of their trials that --quick makes.
QUICK = dict.fromkeys(STAGES, 0.04) | {"ranks": 0, "upstream": 0.02, "hostile": 0.02, "mutated": 0.02, "commandline": 0}
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


def stage_trials(before: Path, name: str, kills: int) -> Iterator[Trial]:
    """The trials of a stage, on copies of a folder in which those before it have run."""
    stage = STAGES[name]

    @cache
    def undisturbed(*settings: str) -> tuple[Ended, dict[str, str]]:
        with trial_folder(before) as folder:
            ended = stage.run(folder, *settings, prepare=counted)
            assert ended.code == 0 and stage.made(folder), (name, ended)
            return ended, stage.made(folder)
    whole, reference = undisturbed()

    def disturbed(fault: str, about: Fault, number: int) -> Result:
        with trial_folder(before) as folder:
            moment = random.uniform(0.0, whole.seconds)
            disturbed = stage.start(folder, prepare=about.prepare(number, whole)).wait(about.sent, moment)
            disturbances.allow(folder / "out", 0o755)
            again = stage.run(folder)
            bad = flaws(disturbed, about.codes) + flaws(again, (0,)) + compared(reference, stage.made(folder))
            bad["lost"] += len(list((folder / "out").rglob("*.part")))
            return name, fault, show(bad, f"{name}, {fault} {number} at {moment:.2f}", disturbed, again)

    def two_at_once(fault: str, settings: tuple[str, ...]) -> Result:
        """Whoever is refused then, afterwards each of the two is right or refused, and one of them is right."""
        with trial_folder(before) as folder:
            first = stage.start(folder)
            time.sleep(random.choice([0, random.uniform(0, whole.seconds)]))
            ended, bad = [stage.start(folder, *settings).wait(), first.wait()], Counter()
            for mine in ((), settings):
                ended.append(stage.run(folder, *mine))
                if ended[-1].code == 0:
                    bad += compared(undisturbed(*mine)[1], stage.made(folder))
            bad += sum(map(flaws, ended), Counter())
            bad["lost"] += all(command.code for command in ended[2:])
            return name, fault, show(bad, f"{name}, {fault}", *ended)

    for fault, about in faults(kills).items():
        yield from (partial(disturbed, fault, about, number) for number in range(about.times))
    for _ in range((kills + 3) // 4):
        yield partial(two_at_once, "two at once", ())
        yield partial(two_at_once, "two at once, other settings", stage.other)


# ---- all -------------------------------------------------------------------------------------------------------------

def table(results: list[Result]) -> str:
    lines = [f"| stage | fault | times | {' | '.join(TITLES)} |", "|---" * (3 + len(TITLES)) + "|"]
    for key in dict.fromkeys((stage, fault) for stage, fault, _ in results):
        rows = [bad for stage, fault, bad in results if (stage, fault) == key]
        counts = [sum(bool(row[column]) for row in rows) for column in COLUMNS]
        lines.append("| " + " | ".join(map(str, (*key, len(rows), *counts))) + " |")
    return "\n".join(lines) + "\n"


def write_table(text: str) -> None:
    """In place of the table that the document has."""
    document = DOCUMENT.read_text()
    begin = document.index("| stage | fault |")
    DOCUMENT.write_text(document[:begin] + text + document[document.index("\n\n", begin) + 1 :])


def results_of(part: str, folders: dict[str, Path], kills: int, share: float) -> list[Result]:
    """The trials of a part of the campaign, or a share (0 .. 1) of them."""
    others = {"ranks": partial(ranks.trials, folders, kills), "upstream": partial(upstream.trials, folders),
              "hostile": partial(hostile.trials, folders), "mutated": partial(hostile.mutated, folders),
              "commandline": partial(hostile.command_line, folders)}
    random.seed(part)
    begun, trials = time.monotonic(), others.get(part) or partial(stage_trials, folders[part], part, kills)
    results = [trial() for trial in (trials() if share else ()) if random.random() < share]
    print(f"{part}: {len(results)} trials in {time.monotonic() - begun:.0f} s", flush=True)
    return results


def main() -> None:
    arguments, begun = sys.argv[1:], time.monotonic()
    is_quick, wanted = "--quick" in arguments, [name for name in arguments if name.isidentifier()]
    kills = int(next(filter(str.isdigit, arguments), 1 if is_quick else KILLS))
    with tempfile.TemporaryDirectory() as folder:
        folders, results = chain(Path(folder)), []
        with ProcessPoolExecutor(1 if is_quick else 2, get_context("fork"), end_with_parent) as pool:
            shares = {part: (QUICK if is_quick else {}).get(part, 1.0) for part in wanted or QUICK}
            for part in [pool.submit(results_of, part, folders, kills, share) for part, share in shares.items()]:
                results += part.result()
    text, bad = table(results), sum(bool(row.total()) for *_, row in results)
    print(text)
    print(f"{len(results)} trials, {bad} of them bad, {(time.monotonic() - begun) / 60:.1f} minutes")
    if "--write" in arguments:
        write_table(text)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
