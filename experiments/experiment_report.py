"""The tables and the plots of experiments/experiment.py, and its verdicts."""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t as student

from experiments import documents
from experiments.demo import STRATEGIES
from experiments.experiment_trials import CEILING, FRONTIER, W0, Trial
from experiments.solver_trials import Images
from utils.runtime.figures import save_figure
from utils.runtime.files import write_text

OF_IMAGES = {"genuine_mean": "genuine mean", "impostor_mean": "impostor mean", "vendi": "Vendi score", "fdr": "FDR"}
OF_TESTS = {"accuracy": "pairs, %", "TAR@1e-2": "TAR at FAR 1e-2, %", "TAR@1e-3": "TAR at FAR 1e-3, %"}
# What is an improvement: points of accuracy, or a ratio of TAR. Fixed before anything was measured.
POINTS, RATIO = 3.0, 1.3

Figures = Mapping[str, Any]
Trials = Mapping[str, Mapping[int, Figures]]  # arm, seed


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
        self.known: dict[str, dict[str, dict[int, Figures]]] = {}  # group of trials, arm, seed
        self.images: dict[str, Images] = {}  # group

    def add(self, trial: Trial, figures: Figures) -> None:
        self.images[trial.group] = trial.images
        self.known.setdefault(trial.group, {}).setdefault(trial.arm.name, {})[trial.seed] = figures
        self.write()

    def draw(self) -> None:
        """The plots of what is known."""
        for part in PLOTS.keys() & self.known.keys():
            for folder in (self.folder, *[documents.ROOT / "docs" / "demo"] * self.docs):
                save_figure(PLOTS[part](self), folder / f"{part}.png")

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def tests(self) -> list[str]:
        """The names of the test sets, LFW's held-out folds first."""
        return list(next(iter(next(iter(next(iter(self.known.values())).values())).values()))["tests"])

    def best_of_frontier(self) -> list[str]:
        """Of the plain negatives and of those with variety: the highest geometric mean of TAR at both FARs on all tests, of the
        seeds that all have."""
        arms = self.known.get("frontier", {})
        shared = set.intersection(*map(set, arms.values())) if arms else set()
        tar = {arm: sum(math.log(max(test.get(name, 0), 1e-3)) for seed in shared for test in seeds[seed]["tests"].values()
                        for name in ("TAR@1e-2", "TAR@1e-3")) for arm, seeds in arms.items()}
        ranked = sorted(arms.keys() - {W0}, key=lambda arm: (-tar[arm], arm))
        return [arm for is_plain in (True, False) for arm in [one for one in ranked if FRONTIER[one].is_plain == is_plain][:1]]

    def baselines(self, group: str) -> list[str]:
        """w = 0 and the negatives without anything else; of the frontier only the best of them."""
        bases = [arm for arm in self.known.get(group, {}) if arm in FRONTIER and FRONTIER[arm].is_plain]
        return [arm for arm in bases if group != "frontier" or arm in (W0, *self.best_of_frontier()[:1])]

    def paired(self, arm: str, base: str, test: str, measure: str, group: str = "factorial") -> tuple[float, float, float] | None:
        """The mean of `difference` over the seeds that both have, and its 90% interval."""
        ours, theirs = self.trained(group)[arm], self.trained(group)[base]
        found = [difference(ours[seed], theirs[seed], test, measure) for seed in sorted(ours.keys() & theirs.keys())]
        return t_interval(found) if found and None not in found else None

    def trained(self, group: str = "factorial") -> Trials:
        """All of a group; the ceiling is compared with the factorial."""
        return (self.known.get("ceiling", {}) if group == "factorial" else {}) | self.known.get(group, {})

    def helps(self, arm: str, base: str, group: str = "factorial") -> bool:
        """POINTS more accuracy or RATIO times the TAR at FAR 1e-2 on LFW, the interval clear of nothing, and on all tests."""
        for measure, wanted in (("accuracy", POINTS), ("TAR@1e-2", math.log(RATIO))):
            found = [self.paired(arm, base, test, measure, group) for test in self.tests()]
            if None not in found and found[0][0] >= wanted and all(low > 0 for _, low, _ in found):
                return True
        return False

    # ---- tables ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        lines = [line for group in self.groups() for line in self.group(group)]
        text = "\n".join([f"Measured on {self.kind}.", "", *lines]) + "\n"
        write_text(self.folder / "experiment.md", text)
        if self.docs:
            text += "".join(f"\n![{what}](demo/{part}.png)\n" for part, what in ALT.items() if part in self.known)
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

    def groups(self) -> list[str]:
        """In the order of the tables."""
        several = dict.fromkeys("factorial" if group == "ceiling" else group for group in self.known)
        return sorted(several, key=lambda group: list(TITLES).index(group.partition(" ")[0]))

    def group(self, group: str) -> list[str]:
        """What is known of a group: a row for each arm, and the paired differences."""
        rows = [self.row(f"{arm} ({len(seeds)})", list(seeds.values())) for arm, seeds in self.trained(group).items()]
        images = self.images.get(group) or self.images["ceiling"]
        return [f"## {TITLES[group.partition(' ')[0]]}: {images.identities} identities x {images.each} images", "",
                "In brackets the number of seeds; +- is the standard deviation over them.", "", *self.header("images"), *rows, "",
                *self.differences(group)]

    def differences(self, group: str) -> list[str]:
        """Empty where there is nothing to compare with, or, of the frontier, only one seed."""
        trials, bases = self.trained(group), self.baselines(group)
        if not bases or group == "frontier" and max(map(len, trials.values())) == 1:
            return []
        measures = [(test, measure) for test in self.tests() for measure in OF_TESTS]
        columns = [f"{test}: {'points' if measure == 'accuracy' else 'ratio of ' + OF_TESTS[measure].removesuffix(', %')}"
                   for test, measure in measures]
        lines = ["Paired differences of the seeds that both have, with 90% intervals by Student's t; ratios are geometric means. "
                 f"*Helps*: {POINTS:g} points or {RATIO:g} times the TAR at FAR 1e-2 on LFW's held-out folds, the interval clear "
                 "of no difference there and on the other test sets.", "",
                 "| images | against | seeds | " + " | ".join(columns) + " | helps |", "|" + "---|" * (len(columns) + 4)]
        for base in bases:
            for arm, seeds in trials.items():
                both = seeds.keys() & trials[base].keys()
                if arm != base and both:
                    cells = [self.interval(arm, base, test, measure, group) for test, measure in measures]
                    is_told = arm != CEILING.name and len(both) > 1
                    cells.append(("yes" if self.helps(arm, base, group) else "no") if is_told else "")
                    lines.append(f"| {arm} | {base} | {len(both)} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def interval(self, arm: str, base: str, test: str, measure: str, group: str) -> str:
        found = self.paired(arm, base, test, measure, group)
        if found is None:
            return ""
        value, low, high = found if measure == "accuracy" else map(math.exp, found)
        sign = "+.2f" if measure == "accuracy" else ".2f"
        return f"{value:{sign}}" + ("" if math.isnan(low) else f" ({low:{sign}} to {high:{sign}})")

    def plot_factorial(self) -> Figure:
        """TAR at FAR 1e-2 on each test set as a ratio to that of w = 0, with 90% intervals where there are several seeds."""
        figure, arms = Figure(figsize=(11, 6), layout="constrained"), [arm for arm in self.trained() if arm != W0]
        every = figure.subplots(1, len(self.tests()), sharey=True, squeeze=False)[0]
        for axes, test in zip(every, self.tests(), strict=True):
            for y, arm in enumerate(arms):
                if W0 in self.trained() and (found := self.paired(arm, W0, test, "TAR@1e-2")):
                    value, low, high = map(math.exp, found)
                    axes.plot([low, high], [y, y], color="C0")
                    axes.plot(value, y, "o" if arm in self.known["factorial"] else "s", color="C0")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.axvline(RATIO, color="black", linewidth=0.8, linestyle="dotted")
            axes.set(xlabel=f"{test}: TAR at FAR 1e-2, ratio to w0", yticks=range(len(arms)), yticklabels=arms)
        every[0].invert_yaxis()  # shared
        return figure

    def plot_frontier(self) -> Figure:
        """Accuracy and TAR on the first test set against genuine mean and Vendi score; a point is the mean of an arm."""
        figure, test, kinds = Figure(figsize=(11, 8), layout="constrained"), self.tests()[0], [*STRATEGIES, "adaptdiff"]
        for line, measure in zip(figure.subplots(2, 2), ("accuracy", "TAR@1e-2"), strict=True):
            for axes, key in zip(line, ("genuine_mean", "vendi"), strict=True):
                for arm, seeds in self.known["frontier"].items():
                    if all(measure in one["tests"][test] for one in seeds.values()):
                        at = mean(one[key] for one in seeds.values()), mean(one["tests"][test][measure] for one in seeds.values())
                        colour = "black" if arm == W0 else f"C{kinds.index(arm.split()[0].rstrip(','))}"
                        axes.plot(*at, "o" if FRONTIER[arm].is_plain else "^", color=colour)
                        axes.annotate(arm, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
                axes.set(xlabel=OF_IMAGES[key], ylabel=f"{test}: {OF_TESTS[measure]}")
        return figure


TITLES = {"frontier": "Frontier", "factorial": "Factorial", "identities": "More identities"}
PLOTS = {"frontier": Report.plot_frontier, "factorial": Report.plot_factorial}
ALT = {"frontier": "Accuracy and TAR against genuine mean and variety", "factorial": "Each arm's TAR as a ratio to that of w = 0"}
