"""The tables and the plots of experiments/experiment.py, and its verdicts."""
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from experiments import documents
from experiments.blocks import Values, contrast
from experiments.demo import STRATEGIES
from experiments.experiment_trials import CEILING, FRONTIER, KEPT, W0, Trial
from utils.runtime.figures import save_figure
from utils.runtime.files import write_text

OF_IMAGES = {"genuine_mean": "genuine mean", "impostor_mean": "impostor mean", "vendi": "Vendi score", "fdr": "FDR"}
OF_TESTS = {"accuracy": "pairs, %", "TAR@1e-2": "TAR at FAR 1e-2, %", "TAR@1e-3": "TAR at FAR 1e-3, %"}
# What is an improvement: points of accuracy, or a ratio of TAR. Fixed before anything was measured.
POINTS, RATIO = 3.0, 1.3
DOCUMENT = "docs/experiment.md"

Row = Mapping[str, Any]  # what Laboratory.row says of a trial


def measured(row: Row, test: str, measure: str) -> float | None:
    """Accuracy in per cent, or the logarithm of a TAR; None where it is not known, or the TAR is 0."""
    value = row["tests"][test].get(measure)
    if value is None or measure == "accuracy":
        return value
    return math.log(value) if value > 0 else None


class Report:
    """What is known so far, written anew with each addition.

    Args:
        rows: of trials made before, maybe elsewhere.
        others: rows that are in no table but kept, of another recipe or number of images.
        docs: also into docs/, and the rows themselves into KEPT.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], others: Sequence[Row], docs: bool) -> None:
        self.folder, self.rows, self.others, self.docs = folder, list(rows), list(others), docs

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def is_kept(self, trial: Trial, processor: str) -> bool:
        """It is among the rows, or its seed is and was another processor's: what is compared within a seed is of one kind."""
        return any(row["seed"] == trial.seed and (row["arm"] == trial.arm.name or row["processor"] != processor)
                   for row in self.rows if row["table"] == trial.table)

    @property
    def known(self) -> dict[str, dict[str, dict[int, Row]]]:
        """By table, arm and seed."""
        known: dict[str, dict[str, dict[int, Row]]] = {}
        for row in self.rows:
            known.setdefault(row["table"], {}).setdefault(row["arm"], {})[row["seed"]] = row
        return known

    def draw(self) -> None:
        """The plots of what is known."""
        for part in self.drawn():
            for folder in (self.folder, *[documents.ROOT / "docs" / "demo"] * self.docs):
                save_figure(PLOTS[part](self), folder / f"{part}.png")

    def drawn(self) -> list[str]:
        """The parts that have a plot: those where anything can be compared with w = 0."""
        return [part for part in PLOTS if len(self.known.get(part, {})) > 1 and W0 in self.known[part]]

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def tests(self) -> list[str]:
        """The names of the test sets, LFW's held-out folds first."""
        return list(self.rows[0]["tests"])

    def best_of_frontier(self) -> list[str]:
        """Of the plain negatives and of those with variety: the highest geometric mean of TAR at both FARs on all tests, as
        compared with `contrast`."""
        arms = self.known.get("frontier", {})
        values: Values = {(arm, seed): sum(math.log(max(test.get(name, 0), 1e-3)) for test in row["tests"].values()
                                           for name in ("TAR@1e-2", "TAR@1e-3"))
                          for arm, seeds in arms.items() for seed, row in seeds.items()}
        base = W0 if W0 in arms else next(iter(arms), W0)
        above = {arm: contrast(values, arm, base) or (-math.inf,) for arm in arms.keys() - {W0}}
        ranked = sorted(above, key=lambda arm: (-above[arm][0], arm))
        return [arm for is_plain in (True, False) for arm in [one for one in ranked if FRONTIER[one].is_plain == is_plain][:1]]

    def baselines(self, group: str) -> list[str]:
        """w = 0 and the negatives without anything else; of the frontier only the best of them."""
        bases = [arm for arm in self.known[group] if arm in FRONTIER and FRONTIER[arm].is_plain]
        return [arm for arm in bases if group != "frontier" or arm in (W0, *self.best_of_frontier()[:1])]

    def paired(self, arm: str, base: str, test: str, measure: str, group: str = "factorial") -> tuple[float, float, float] | None:
        """Points of accuracy or the logarithm of a ratio of TAR between two arms, and its 90% interval; None where that cannot be
        told, or one of their TARs is 0. Other arms' zeros are left out."""
        found = {(of, seed): measured(row, test, measure) for of, seeds in self.known[group].items()
                 for seed, row in seeds.items()}
        if None in (value for (of, _), value in found.items() if of in (arm, base)):
            return None
        return contrast({key: value for key, value in found.items() if value is not None}, arm, base)

    def helps(self, arm: str, base: str, group: str = "factorial") -> bool:
        """POINTS more accuracy or RATIO times the TAR at FAR 1e-2 on LFW, the interval clear of nothing, and on all tests."""
        for measure, wanted in (("accuracy", POINTS), ("TAR@1e-2", math.log(RATIO))):
            found = [self.paired(arm, base, test, measure, group) for test in self.tests()]
            if None not in found and found[0][0] >= wanted and all(low > 0 for _, low, _ in found):
                return len(self.shared(arm, base, group)) > 1
        return False

    def shared(self, arm: str, base: str, group: str) -> set[int]:
        """The seeds that both have."""
        return set.intersection(*(set(self.known[group][one]) for one in (arm, base)))

    # ---- tables ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        lines = [line for group in self.groups() for line in self.group(group)]
        text = "\n".join(lines) + "\n"
        write_text(self.folder / "experiment.md", text)
        if self.docs:
            text += "".join(f"\n![{what}](demo/{part}.png)\n" for part, what in ALT.items() if part in self.drawn())
            documents.write_between(DOCUMENT, "experiment", text)
            write_text(documents.ROOT / KEPT, "[\n" + ",\n".join(map(json.dumps, [*self.others, *self.rows])) + "\n]\n")

    def header(self, first: str) -> list[str]:
        columns = [*OF_IMAGES.values(), *(f"{test}: {name}" for test in self.tests() for name in OF_TESTS.values())]
        return [f"| {first} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]

    def row(self, name: str, trials: Sequence[Row]) -> str:
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
        return sorted(self.known, key=lambda group: list(TITLES).index(group.partition(" ")[0]))

    def group(self, group: str) -> list[str]:
        """What is known of a group: a row for each arm, and the paired differences."""
        rows = [self.row(f"{arm} ({len(seeds)})", list(seeds.values())) for arm, seeds in self.known[group].items()]
        own = [row for row in self.rows if row["table"] == group]
        made = [f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))} on {processor}"
                for processor in dict.fromkeys(row["processor"] for row in own)
                if (seeds := sorted({row["seed"] for row in own if row["processor"] == processor}))]
        identities, each = own[0]["images"].split("x")
        return [f"## {TITLES[group.partition(' ')[0]]}: {identities} identities x {each} images", "",
                f"Measured: {'; '.join(made)}. In brackets the number of seeds; +- is the standard deviation over them.", "",
                *self.header("images"), *rows, "", *self.differences(group)]

    def differences(self, group: str) -> list[str]:
        """Empty where there is nothing to compare with, or, of the frontier, only one seed."""
        trials, bases = self.known[group], self.baselines(group)
        if not bases or group == "frontier" and max(map(len, trials.values())) == 1:
            return []
        measures = [(test, measure) for test in self.tests() for measure in OF_TESTS]
        columns = [f"{test}: {'points' if measure == 'accuracy' else 'ratio of ' + OF_TESTS[measure].removesuffix(', %')}"
                   for test, measure in measures]
        lines = ["Differences with 90% intervals, by least squares of arm and seed over the whole table (experiments/blocks.py), "
                 "TAR by its logarithm. *Seeds*: how many both have. "
                 f"*Helps*: {POINTS:g} points or {RATIO:g} times the TAR at FAR 1e-2 on LFW's held-out folds, the interval clear "
                 "of no difference there and on the other test sets; said where they share two seeds at least.", "",
                 "| images | against | seeds | " + " | ".join(columns) + " | helps |", "|" + "---|" * (len(columns) + 4)]
        for base in bases:
            for arm in (one for one in trials if one != base):
                both = len(self.shared(arm, base, group))
                cells = [self.interval(arm, base, test, measure, group) for test, measure in measures]
                is_told = arm != CEILING.name and both > 1
                cells.append(("yes" if self.helps(arm, base, group) else "no") if is_told else "")
                lines.append(f"| {arm} | {base} | {both} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def interval(self, arm: str, base: str, test: str, measure: str, group: str) -> str:
        found = self.paired(arm, base, test, measure, group)
        if found is None:
            return ""
        value, low, high = (round(one, 2) + 0.0 for one in (found if measure == "accuracy" else map(math.exp, found)))  # no -0
        sign = "+.2f" if measure == "accuracy" else ".2f"
        return f"{value:{sign}}" + ("" if math.isnan(low) else f" ({low:{sign}} to {high:{sign}})")

    def plot_factorial(self) -> Figure:
        """TAR at FAR 1e-2 on each test set as a ratio to that of w = 0, with 90% intervals."""
        figure, arms = Figure(figsize=(11, 6), layout="constrained"), [arm for arm in self.known["factorial"] if arm != W0]
        every = figure.subplots(1, len(self.tests()), sharey=True, squeeze=False)[0]
        for axes, test in zip(every, self.tests(), strict=True):
            for y, arm in enumerate(arms):
                if found := self.paired(arm, W0, test, "TAR@1e-2"):
                    value, low, high = map(math.exp, found)
                    axes.plot([low, high], [y, y], color="C0")
                    axes.plot(value, y, "s" if arm == CEILING.name else "o", color="C0")
            axes.axvline(1, color="black", linewidth=0.8)
            axes.axvline(RATIO, color="black", linewidth=0.8, linestyle="dotted")
            axes.set(xlabel=f"{test}: TAR at FAR 1e-2, ratio to w0", yticks=range(len(arms)), yticklabels=arms)
        every[0].invert_yaxis()  # shared
        return figure

    def plot_frontier(self) -> Figure:
        """Accuracy and TAR on the first test set, compared with those of w = 0, against genuine mean and Vendi score."""
        figure, test, kinds = Figure(figsize=(11, 9), layout="constrained"), self.tests()[0], [*STRATEGIES, "adaptdiff"]
        every = figure.subplots(2, 2, sharex="col", sharey="row")
        for line, measure in zip(every, ("accuracy", "TAR@1e-2"), strict=True):
            for axes, key in zip(line, ("genuine_mean", "vendi"), strict=True):
                for arm, seeds in self.known["frontier"].items():
                    if arm != W0 and (found := self.paired(arm, W0, test, measure, "frontier")):
                        value, low, high = found if measure == "accuracy" else map(math.exp, found)
                        kind, _, rest = arm.replace(",", "").partition(" ")
                        x, style = mean(one[key] for one in seeds.values()), {"color": f"C{kinds.index(kind)}"}
                        axes.plot([x, x], [low, high], alpha=0.25, **style)
                        axes.plot(x, value, "o" if FRONTIER[arm].is_plain else "^", **style)
                        axes.annotate(" ".join(rest.replace("perturbed", "").split()), (x, value), fontsize=7, xytext=(4, 3),
                                      textcoords="offset points")
                axes.axvline(mean(one[key] for one in self.known["frontier"][W0].values()), color="black", linestyle="dotted")
                axes.margins(x=0.1)  # for the last label
                axes.axhline(0 if measure == "accuracy" else 1, color="black", linewidth=0.8)
            line[0].set_ylabel(f"{test}: {'points' if measure == 'accuracy' else 'ratio of TAR at FAR 1e-2'} against w = 0")
        for axes, key in zip(every[1], ("genuine_mean", "vendi"), strict=True):
            axes.set_xlabel(f"{OF_IMAGES[key]} (dotted: of w = 0)")
        styles = {kind: ("s", f"C{k}") for k, kind in enumerate(kinds)} | {"plain": ("o", "grey"), "with variety": ("^", "grey")}
        for name, (marker, colour) in styles.items():
            every[0, 0].plot([], [], marker, color=colour, label=name)
        figure.legend(loc="outside upper center", ncols=len(styles))
        return figure


TITLES = {"frontier": "Frontier", "factorial": "Factorial", "identities": "More identities"}
PLOTS = {"frontier": Report.plot_frontier, "factorial": Report.plot_factorial}
ALT = {"frontier": "Accuracy and TAR on LFW, against w = 0, by genuine mean and variety",
       "factorial": "Each arm's TAR as a ratio to that of w = 0"}
