"""One of two ranks dies: the other ends soon, none is left, and the same command goes on to the same files."""
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.faults.judging import Result, Trial, compared, flaws, show, trial_folder
from tests.faults.processes import Forked, children
from tests.faults.stages import SETTINGS, STAGES, Stage
from utils.runtime.errors import run_script

SOON = 30  # seconds in which the others must end


def torchrun(stage: Stage, folder: Path) -> Forked:
    """The stage on two ranks, as the command torchrun starts them, forked from this process."""
    def rank() -> None:
        sys.argv = ["stage.py", *SETTINGS, *stage.settings]
        run_script(stage.main)

    def main() -> None:
        os.chdir(folder)
        elastic_launch(LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                                    start_method="fork", monitor_interval=0.1), rank)()
    return Forked(main)


def trials(folders: dict[str, Path], kills: int) -> Iterator[Trial]:
    for name, stage in STAGES.items():
        if stage.ranks:
            with trial_folder(folders[name]) as folder:
                whole = torchrun(stage, folder).wait()
                reference = stage.made(folder)
            assert whole.code == 0 and reference, (name, whole)
            for number in range(max(2, kills // 4)):
                yield partial(trial, folders[name], name, number, whole.seconds, reference)


def trial(before: Path, name: str, number: int, seconds: float, reference: dict[str, str]) -> Result:
    stage = STAGES[name]
    with trial_folder(before) as folder:
        running = torchrun(stage, folder)
        time.sleep(random.uniform(0.2, 1) * seconds)
        if ranks := children(running.pid):
            os.kill(ranks[number % len(ranks)], signal.SIGKILL)
        killed = time.monotonic()
        ended = running.wait()
        took = time.monotonic() - killed
        again = torchrun(stage, folder).wait()
        bad = flaws(again, (0,)) + compared(reference, stage.made(folder))
        bad["hangs"] += (took > SOON) + len(ended.orphans)
        return name, "one of two ranks killed", show(bad, f"{name}, rank killed {number}, ended {took:.1f} s later", ended, again)
