"""The paper's experiment on the embedded miniature, `make demo`: every stage in order, from contexts to a recogniser.

Prints each command and runs it; all in this one process, since twenty times loading the libraries would take minutes.
Settings go to every stage; run again after a stop, it goes on.

    python -m experiments.demo
    python -m experiments.demo paths.run=w1 guidance.w=1

Writes  <output>/demo/<run>/ (instead of demo: paths.run) for w = 0 and for each strategy, <output>/demo/scores/<recogniser>/,
        <output>/demo/report.html
"""
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import places
from config.load import load_config
from utils.runtime.errors import run_script
from utils.runtime.progress import in_time

STRATEGIES = ("null", "close", "rand", "mid", "far")
# Seconds of a stage that is longer than one second, on two CPU cores with AVX-512 and bfloat16.
SECONDS = {"sample": 7, "align": 2, "plot_distributions": 7, "train_fr": 16}


def main() -> None:
    given = [argument for argument in sys.argv[1:] if not argument.startswith("paths.run=")]
    config = load_config(__doc__)
    name = config.paths.run or "demo"

    # the same contexts and the same noise in each run
    stages = [("create_sample_identity_contexts", *given), ("sample", *given, "guidance.w=0", f"paths.run={name}/w0")]
    for strategy in STRATEGIES:
        stages += [("create_negative_contexts", *given, f"negatives.strategy={strategy}"),
                   ("sample", *given, f"negatives.strategy={strategy}", f"paths.run={name}/{strategy}")]
    folders = [f"{name}/{run}" for run in ("w0", *STRATEGIES)]
    stages += [("align", *given, f"paths.run={folder}") for folder in folders]
    stages += [("plot_distributions", *given, f"scores.overlay={','.join(folders)}"),
               # a real training run, as far as a laptop takes it in a minute or two
               ("train_fr", "fr.epochs=2", "fr.images_per_identity=4", "training.compile=false", *given, f"paths.run={name}/far"),
               ("report", *folders, *given)]

    took: list[tuple[str, float]] = []
    for number, (script, *arguments) in enumerate(stages, start=1):
        left = seconds_left([script for script, *_ in stages], took)
        print(f"\n[stage {number} of {len(stages)}, about {in_time(left)} left]", end="")
        began = time.monotonic()
        stage(script, *arguments)
        took.append((script, time.monotonic() - began))

    scores = places.scores(Path(config.paths.output) / name, config)
    print(f"\nDone. Open {places.report(Path(config.paths.output) / name)} in a browser: the same identities with and without\n"
          "negative contexts, their scores beside the paper's, and how all of it was made.\n"
          f"The same as files: faces.png, distributions.png and table.md in {scores}.")


def seconds_left(scripts: Sequence[str], took: Sequence[tuple[str, float]]) -> float:
    """What the scripts after those that are done will take: as long as they took in this run; those that had no turn yet
    their SECONDS, as much longer or shorter as the others were."""
    longest = {script: max(seconds for other, seconds in took if other == script) for script, _ in took}
    known = SECONDS.keys() & longest.keys()
    speed = sum(longest[script] for script in known) / sum(SECONDS[script] for script in known) if known else 1
    return sum(longest.get(script, SECONDS.get(script, 1) * speed) for script in scripts[len(took):])


def stage(script: str, *arguments: str) -> None:
    """Run a stage's script in this process as its command line would."""
    sys.argv = [f"{script}.py", *arguments]
    print(f"\n$ python {' '.join(sys.argv)}", flush=True)
    importlib.import_module(script).main()


if __name__ == "__main__":
    run_script(main)
