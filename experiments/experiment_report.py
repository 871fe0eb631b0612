"""The tables and the plot of experiments/experiment.py, and its verdicts."""
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t as student

from experiments import documents
from experiments.experiment_trials import FRONTIER, W0, Trial
from utils.runtime.figures import save_figure
from utils.runtime.files import write_text

OF_IMAGES = {"genuine_mean": "genuine mean", "impostor_mean": "impostor mean", "vendi": "Vendi score", "fdr": "FDR"}
OF_TESTS = {"accuracy": "pairs, %", "TAR@1e-2": "TAR at FAR 1e-2, %", "TAR@1e-3": "TAR at FAR 1e-3, %"}
# What is an improvement: points of accuracy, or a ratio of TAR. Fixed before anything was measured.
POINTS, RATIO = 3.0, 1.3

Figures = Mapping[str, Any]


def t_interval(values: Sequence[float], level: float = 0.9) -> tuple[float, float, float]:
    """Mean, and the limits of its interval by Student's t; NaN limits of fewer than two values."""
    if len(values) < 2:
        return mean(values), math.nan, math.nan
    reach = student.ppf((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - reach, mean(values) + reach


def difference(ours: Figures, theirs: Figures, test: str, measure: str) -> float | None:
    """Points of accuracy, or the logarithm of the ratio of TAR; None where one is not known, or a TAR is 0."""
    a, b = (figures["tests"][test].get(measure) for figures in (ours, theirs))
    if a is None or b is None:
        return None
    if measure == "accuracy":
        return a - b
    return math.log(a / b) if a > 0 and b > 0 else None


class Report:
    """What is known so far, written anew with each addition. `docs`: also into docs/."""

    def __init__(self, folder: Path, kind: str, docs: bool) -> None:
        self.folder, self.kind, self.docs = folder, kind, docs
        self.known: dict[str, dict[str, dict[int, Figures]]] = {}  # part, arm, seed

    def add(self, trial: Trial, figures: Figures) -> None:
        self.known.setdefault(trial.part, {}).setdefault(trial.arm.name, {})[trial.seed] = figures
        self.write()
        if trial.part == "frontier":
            for folder in (self.folder, *[documents.ROOT / "docs" / "demo"] * self.docs):
                save_figure(self.plot(), folder / "frontier.png")

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def tests(self) -> list[str]:
        """The names of the test sets, LFW's held-out folds first."""
        return list(next(iter(next(iter(next(iter(self.known.values())).values())).values()))["tests"])

    def accuracy(self, part: str, arm: str, seeds: Collection[int]) -> float:
        """On LFW's held-out folds, the mean of some seeds."""
        return mean(self.known[part][arm][seed]["tests"][self.tests()[0]]["accuracy"] for seed in seeds)

    def best_of_frontier(self) -> str | None:
        """The negative with the highest accuracy on LFW's held-out folds; None where none is known."""
        arms = self.known.get("frontier", {})
        return max(sorted(arms.keys() - {W0}), key=lambda arm: self.accuracy("frontier", arm, arms[arm]), default=None)

    def baselines(self) -> list[str]:
        """w = 0, and the best of the negatives without anything else, of those in the factorial, by the seeds that all have."""
        arms = self.known["factorial"]
        plain = [arm for arm in arms if arm in FRONTIER and arm != W0]
        if seeds := set.intersection(*(set(arms[arm]) for arm in plain)) if plain else ():
            plain = [max(plain, key=lambda arm: self.accuracy("factorial", arm, seeds))]
        return [W0] * (W0 in arms) + plain[:1]

    def paired(self, arm: str, base: str, test: str, measure: str) -> tuple[float, float, float] | None:
        """The mean of `difference` over the seeds that both have, and its 90% interval."""
        ours, theirs = self.known["factorial"][arm], self.known["factorial"][base]
        found = [difference(ours[seed], theirs[seed], test, measure) for seed in sorted(ours.keys() & theirs.keys())]
        return t_interval(found) if found and None not in found else None

    def helps(self, arm: str, base: str) -> bool:
        """POINTS more accuracy or RATIO times the TAR at FAR 1e-2 on LFW, the interval clear of nothing, and on all tests."""
        for measure, wanted in (("accuracy", POINTS), ("TAR@1e-2", math.log(RATIO))):
            found = [self.paired(arm, base, test, measure) for test in self.tests()]
            if None not in found and found[0][0] >= wanted and all(low > 0 for _, low, _ in found):
                return True
        return False

    # ---- tables ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        text = "\n".join([f"Measured on {self.kind}.", "", *self.frontier(), *self.factorial(), *self.differences()]) + "\n"
        write_text(self.folder / "experiment.md", text)
        if self.docs:
            if "frontier" in self.known:
                text += "\n![Accuracy and TAR against genuine mean and variety](demo/frontier.png)\n"
            documents.write_between("docs/experiment.md", "experiment", text)

    def header(self, first: str) -> list[str]:
        columns = [*OF_IMAGES.values(), *(f"{test}: {name}" for test in self.tests() for name in OF_TESTS.values())]
        return [f"| {first} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]

    def row(self, name: str, trials: Sequence[Figures]) -> str:
        """Means over the seeds, with the standard deviation where there are several."""
        def cell(values: Sequence[float | None], digits: int) -> str:
            if None in values:
                return ""
            return f"{mean(values):.{digits}f}" + (f" +- {stdev(values):.{digits}f}" if len(values) > 1 else "")

        cells = [cell([one.get(key) for one in trials], 3) for key in OF_IMAGES]
        cells += [cell([one["tests"][test].get(key) for one in trials], 2) for test in self.tests() for key in OF_TESTS]
        return f"| {name} | " + " | ".join(cells) + " |"

    def frontier(self) -> list[str]:
        arms = self.known.get("frontier", {})
        rows = [self.row(arm, list(seeds.values())) for arm, seeds in arms.items()]
        return ["## The frontier: one seed", "", *self.header("images"), *rows, ""] if rows else []

    def factorial(self) -> list[str]:
        rows = [self.row(f"{arm} ({len(seeds)})", list(seeds.values())) for part in ("ceiling", "factorial")
                for arm, seeds in self.known.get(part, {}).items()]
        return ["## Recognisers trained on equal numbers of images", "", "In brackets the number of seeds; +- is the standard "
                "deviation over them.", "", *self.header("images"), *rows, ""] if rows else []

    def differences(self) -> list[str]:
        if "factorial" not in self.known:
            return []
        measures = [(test, measure) for test in self.tests() for measure in ("accuracy", "TAR@1e-2")]
        columns = [f"{test}: {'points' if measure == 'accuracy' else 'ratio of TAR at FAR 1e-2'}" for test, measure in measures]
        lines = ["## Paired differences", "", "Of the seeds that both have, with 90% intervals by Student's t; ratios are "
                 f"geometric means. *Helps*: {POINTS:g} points or {RATIO:g} times the TAR on LFW's held-out folds, the interval "
                 "clear of no difference there and on the other test sets.", "",
                 "| images | against | seeds | " + " | ".join(columns) + " | helps |", "|" + "---|" * (len(columns) + 4)]
        for base in self.baselines():
            for arm, seeds in self.known["factorial"].items():
                both = seeds.keys() & self.known["factorial"][base].keys()
                if arm != base and both:
                    cells = [self.interval(arm, base, test, measure) for test, measure in measures]
                    lines.append(f"| {arm} | {base} | {len(both)} | " + " | ".join(cells)
                                 + f" | {'yes' if self.helps(arm, base) else 'no'} |")
        return [*lines, ""]

    def interval(self, arm: str, base: str, test: str, measure: str) -> str:
        found = self.paired(arm, base, test, measure)
        if found is None:
            return ""
        value, low, high = found if measure == "accuracy" else map(math.exp, found)
        sign = "+.2f" if measure == "accuracy" else ".2f"
        return f"{value:{sign}}" + ("" if math.isnan(low) else f" ({low:{sign}} to {high:{sign}})")

    def plot(self) -> Figure:
        """Accuracy and TAR on the first test set against genuine mean and Vendi score, a point for each set of the frontier."""
        figure, test = Figure(figsize=(11, 8), layout="constrained"), self.tests()[0]
        for line, measure in zip(figure.subplots(2, 2), ("accuracy", "TAR@1e-2"), strict=True):
            for axes, key in zip(line, ("genuine_mean", "vendi"), strict=True):
                for arm, seeds in self.known["frontier"].items():
                    one, = seeds.values()
                    if measure in one["tests"][test]:
                        at = one[key], one["tests"][test][measure]
                        axes.plot(*at, "o", color="black" if arm == W0 else f"C{(list(FRONTIER).index(arm) - 1) // 3}")
                        axes.annotate(arm, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
                axes.set(xlabel=OF_IMAGES[key], ylabel=f"{test}: {OF_TESTS[measure]}")
        return figure
