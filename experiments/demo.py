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
from pathlib import Path

from config import places
from config.load import load_config
from experiments.experiment import STRATEGIES
from utils.runtime.errors import run_script


def main() -> None:
    given = [argument for argument in sys.argv[1:] if not argument.startswith("paths.run=")]
    config = load_config(__doc__)
    name = config.paths.run or "demo"

    # the same contexts and the same noise in each run
    stage("create_sample_identity_contexts", *given)
    stage("sample", *given, "guidance.w=0", f"paths.run={name}/w0")
    for strategy in STRATEGIES:
        stage("create_negative_contexts", *given, f"negatives.strategy={strategy}")
        stage("sample", *given, f"negatives.strategy={strategy}", f"paths.run={name}/{strategy}")
    folders = [f"{name}/{run}" for run in ("w0", *STRATEGIES)]
    for folder in folders:
        stage("align", *given, f"paths.run={folder}")
    stage("plot_distributions", *given, f"scores.overlay={','.join(folders)}")
    # a real training run, as far as a laptop takes it in a minute or two
    stage("train_fr", "fr.epochs=2", "fr.images_per_identity=4", "training.compile=false", *given, f"paths.run={name}/far")

    stage("report", *folders, *given)

    scores = places.scores(Path(config.paths.output) / name, config)
    print(f"\nDone. Open {places.report(Path(config.paths.output) / name)} in a browser: the same identities with and without\n"
          "negative contexts, their scores beside the paper's, and how all of it was made.\n"
          f"The same as files: faces.png, distributions.png and table.md in {scores}.")


def stage(script: str, *arguments: str) -> None:
    """Run a stage's script in this process as its command line would."""
    sys.argv = [f"{script}.py", *arguments]
    print(f"\n$ python {' '.join(sys.argv)}", flush=True)
    importlib.import_module(script).main()


if __name__ == "__main__":
    run_script(main)
