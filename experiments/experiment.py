"""Do negative contexts make better recognisers, and deliberate variety with them? Judged against w = 0 and against real faces.

Writes  <output>/experiment/trials/: each trial, kept as it goes; run again, it goes on. <output>/experiment/runs/: its images
        <output>/experiment/experiment.md, frontier.png, factorial.png: rewritten as trials are added; with --docs in
        docs/ too

    python -m experiments.experiment
    python -m experiments.experiment --minutes 600 --docs scores.recogniser=data/mobilefacenet_independent.ncnn.param

First the frontier: w = 0, the paper's five strategies at three w, AdaptDiff, Far with annealing, and with perturbed contexts
Far, at two w in three cones, and AdaptDiff; a recogniser trained on each set. Then, for one seed after the other, recognisers
of as many real faces (the ceiling), of each arm of the factorial, and of w = 0 and Far, plain and perturbed, of many
identities with few images each: contexts, images and training anew with each seed, differences within seeds from w = 0 and
from the plain negatives. fp32; trials of other weights or of another kind of processor are made anew. Settings go to every
stage; the solver is that of the settings. Processes may share the output, each with --seeds of its own; one more run with all
seeds writes the tables of all of them. With --docs (one process at a time) the tables have the trials of
docs/experiment_trials.json too, whichever machine made them; those are not made again.
"""
import argparse
import time
from collections.abc import Iterable, Iterator

from config import places
from config.load import load_config
from experiments import documents
from experiments.experiment_report import DOCUMENT, Report
from experiments.experiment_trials import (
    CEILING,
    FRONTIER,
    IDENTITIES,
    KEPT,
    RATES,
    Arm,
    Laboratory,
    TooFewError,
    Trial,
    factorial,
)
from experiments.options import parse
from experiments.solver_trials import Images
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script

PARTS = ("frontier", "ceiling", "factorial", "identities")


def main() -> None:
    options, given = arguments()
    config = load_config(__doc__, arguments=["--preset", "experiment", *given])
    laboratory = Laboratory(config, given, options.spare, distributed.setup(config.device).device)
    kept: tuple[list, list] = [], []
    if options.docs:
        documents.around(DOCUMENT, "experiment")  # rather now than after the first trial
        kept = laboratory.kept({"frontier": options.frontier, "factorial": options.sets})
    require_other_seeds(options, {row["seed"] for row in kept[0] if row["table"] == "frontier"})
    study = Study(laboratory, options, Report(places.experiment_folder(config), *kept, options.docs))
    study.estimate()
    study.run()
    print(f"written to {study.report.folder}", *study.without, sep="\n")
    if study.skipped:
        print(f"{len(study.skipped)} trials did not fit into {options.minutes:g} minutes (the first: {study.skipped[0]}): run "
              "the same command again")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    def images(text: str) -> Images:
        identities, each = map(int, text.split("x"))
        return Images(identities, each)

    def parts(text: str) -> tuple[str, ...]:
        if not set(chosen := tuple(text.split(","))) <= set(PARTS):
            raise argparse.ArgumentTypeError(f"choose from {', '.join(PARTS)}")
        return chosen

    def arms(text: str) -> tuple[str, ...]:
        for name in (chosen := tuple(text.split(";"))):
            if name not in (known := [arm.name for arm in factorial(FRONTIER)]):
                raise argparse.ArgumentTypeError(f"'{name}' is none; choose from {'; '.join(known)}")
        return chosen

    def seeds(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1200, help="begin no trial that would not end within them")
    parser.add_argument("--parts", type=parts, default=PARTS, help=f"{', '.join(PARTS)}, separated by commas")
    parser.add_argument("--frontier", type=images, default=Images(100, 10), help="identities x images of its sets")
    parser.add_argument("--sets", type=images, default=Images(200, 15), help="identities x images of the factorial's sets")
    parser.add_argument("--identities", type=lambda text: tuple(map(images, text.split(","))), help="identities x images of the "
                        "sets of many, sizes separated by commas", default=(Images(750, 4),))
    parser.add_argument("--arms", type=arms, default=(), help="only these, by their names in the tables, separated by "
                        "semicolons; the factorial then takes any of the frontier's, and the tables have no others but kept ones")
    parser.add_argument("--seeds", type=seeds, default=(1, 2, 3, 4, 5), help="of all but the frontier")
    parser.add_argument("--frontier-seeds", type=seeds, default=(0,), help="none of --seeds: the frontier chooses arms of the "
                        "factorial")
    parser.add_argument("--spare", type=float, default=1.6, help="times as many images of each identity are drawn in the "
                        "factorial, for its band filter to choose from")
    parser.add_argument("--docs", action="store_true", help="write the tables and the plots into docs/ too")
    return parse(parser)


def require_other_seeds(options: argparse.Namespace, kept: set[int]) -> None:
    """Raises UserError where the factorial would have a seed of the frontier, made now or kept."""
    frontier = kept | set(options.frontier_seeds * ("frontier" in options.parts))
    if "factorial" in options.parts and (both := frontier & set(options.seeds)):
        raise UserError(f"--seeds: {min(both)} is a seed of the frontier, which chooses arms of the factorial; give one of them "
                        "other seeds (--frontier-seeds)")


class Study:
    """The trials in their order, within a budget of time."""

    def __init__(self, laboratory: Laboratory, options: argparse.Namespace, report: Report) -> None:
        self.laboratory, self.options, self.report = laboratory, options, report
        self.begun, self.speed, self.skipped, self.without = time.monotonic(), 1.0, [], []

    def trials(self) -> Iterator[Trial]:
        """Those that are not kept in the report, in their order."""
        yield from (trial for trial in self.wanted() if not self.report.is_kept(trial, self.laboratory.processor))

    def wanted(self) -> Iterator[Trial]:
        """What is best of the frontier is asked for when the factorial begins."""
        options = self.options
        if "frontier" in options.parts:
            yield from (Trial("frontier", arm, seed, options.frontier) for seed in options.frontier_seeds
                        for arm in self.chosen(FRONTIER.values()))
        for seed in options.seeds:
            if "ceiling" in options.parts:
                yield Trial("ceiling", CEILING, seed, options.sets)
            if "factorial" in options.parts:
                best = [*self.report.best_of_frontier(), *(name for name in options.arms if name in FRONTIER)]
                arms = self.chosen(factorial(dict.fromkeys(best)))
                yield from (Trial("factorial", arm, seed, options.sets) for arm in arms)
            if "identities" in options.parts:
                yield from (Trial("identities", arm, seed, one) for one in options.identities for arm in self.chosen(IDENTITIES))

    def chosen(self, arms: Iterable[Arm]) -> list[Arm]:
        """Those of --arms."""
        return [arm for arm in arms if not self.options.arms or arm.name in self.options.arms]

    def run(self) -> None:
        for trial in self.trials():
            begun, is_made = time.monotonic(), self.laboratory.is_made(trial)
            expected = seconds(self.laboratory.work(trial))[0]  # of one core or a busy machine, until there is a first trial
            if not is_made and begun - self.begun + expected * self.speed > 60 * self.options.minutes:
                self.skipped.append(f"{trial.group}, {trial.arm.name}, seed {trial.seed}")
                continue
            try:
                self.report.add(self.laboratory.row(trial, self.laboratory.figures(trial)))
            except TooFewError as error:
                self.without.append(str(error))
            if not is_made:
                self.speed += ((time.monotonic() - begun) / expected - self.speed) / 2
                self.report.draw()
        if self.report.rows:
            self.report.write()
            self.report.draw()

    def estimate(self) -> None:
        """What is left will take so long; printed before anything is made."""
        totals: dict[str, dict[str, float]] = {}
        if self.report.rows:
            print(f"{len(self.report.rows)} trials are in {KEPT} and are not made again; others of their seeds are made by the "
                  "same kind of processor only")
        runs: set[tuple] = set()
        for trial in self.trials():
            counts = totals.setdefault(trial.group, dict.fromkeys(RATES, 0.0) | {"trials": 0})
            run = trial.group, trial.arm.settings, trial.seed
            if not self.laboratory.is_made(trial):
                for name, amount in (self.laboratory.work(trial, is_drawn=run in runs) | {"trials": 1}).items():
                    counts[name] += amount
            runs.add(run)
        for part, counts in totals.items():
            slow, fast = (one / 3600 for one in seconds(counts))
            print(f"{part}: {counts['trials']} sets to make, {counts['align']:,.0f} images to draw; TFLOP: "
                  f"{counts['draw'] / 1e3:,.0f} drawing, {counts['train'] / 1e3:,.0f} training; {fast:.1f} to {slow:.1f} h")
        if next(self.wanted(), None) is None:
            raise UserError("--arms: none of them is in --parts; leave one of the two out")
        slow, fast = (sum(one) / 3600 for one in zip((0, 0), *map(seconds, totals.values()), strict=True))
        print(f"all: {fast:.1f} to {slow:.1f} h at the rates that two cores were seen to have, besides two arms at most for the "
              f"best of the frontier; at most {self.options.minutes / 60:.1f} h now; {self.laboratory.kind}", flush=True)


def seconds(work: dict[str, float]) -> tuple[float, float]:
    """At the worst of RATES and at the best."""
    return tuple(sum(work.get(name, 0) / rates[which] for name, rates in RATES.items()) for which in (0, 1))


if __name__ == "__main__":
    run_script(main)
