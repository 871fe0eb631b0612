"""The verdicts of experiments/solvers.py, and its tables and plot."""
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import documents
from experiments.solver_trials import AGAINST_REAL, METRICS, Candidate, Laboratory, Trial
from utils.evaluation.scores import interval
from utils.evaluation.variety import half_sample_interval
from utils.runtime.figures import save_figure
from utils.runtime.files import write_text

CONVERGED_RMS, CONVERGED_FDR = 0.01, 0.02  # what solvers of one limit may differ by: of the latents' std, of the FDR
# How far the 90% interval of a difference may reach from the reference. Fixed before anything was measured.
MARGINS = {"fdr": 0.05, "genuine_mean": 0.01, "impostor_mean": 0.01, "genuine_std": 0.05, "fmr100": 0.02,
           "coverage": 0.03, "recall": 0.03}
RELATIVE = ("fdr", "genuine_std")  # differences as a part of the reference's value
NAMES = {"fdr": "FDR", "eer": "EER", "fmr100": "FMR100", "genuine_mean": "genuine", "genuine_std": "genuine std",
         "impostor_mean": "impostor", "impostor_std": "impostor std", "coverage": "coverage", "recall": "recall"}


def agree(a: Trial, b: Trial, recogniser: str) -> bool:
    """Whether two solvers have reached one limit."""
    one, other = (trial.metrics[recogniser]["fdr"] for trial in (a, b))
    return a.distance(b) < CONVERGED_RMS and abs(one / other - 1) <= CONVERGED_FDR


def choose_reference(trials: Sequence[Trial], recogniser: str, cost: Callable[[Trial], float]) -> Trial | None:
    """The cheapest of those that agree: of all, or else of the largest number that agree with it; None where no two do."""
    friends = {number: sum(agree(trial, other, recogniser) for other in trials) for number, trial in enumerate(trials)}
    most = max(friends.values())
    return min((trials[number] for number in friends if friends[number] == most), key=cost) if most > 1 else None


def differences(trial: Trial, reference: Trial, recogniser: str) -> dict[str, tuple[float, float, float]]:
    """Each of MARGINS less the reference's, and its 90% interval, paired by identity and noise; empty without replicates."""
    found, both = {}, (trial, reference)
    for name in AGAINST_REAL if all(one.of_halves[recogniser] for one in both) else ():
        value, base = (one.metrics[recogniser][name] for one in both)
        values, bases = (one.of_halves[recogniser][name] for one in both)
        found[name] = value - base, *half_sample_interval(value - base, values - bases)
    for name in MARGINS.keys() - set(AGAINST_REAL) if all(one.replicates[recogniser] for one in both) else ():
        value, base = (one.metrics[recogniser][name] for one in both)
        values, bases = (one.replicates[recogniser][name] for one in both)
        if name in RELATIVE:
            value, base, values, bases = value / base, 1.0, values / bases, 1.0
        found[name] = value - base, *interval(values - bases)
    return found


def is_equivalent(trial: Trial, reference: Trial, recogniser: str) -> bool:
    """Whether every interval lies within its margin; coverage and recall count where real faces were given."""
    found = differences(trial, reference, recogniser)
    return "fdr" in found and all(-MARGINS[name] <= low and high <= MARGINS[name] for name, (_, low, high) in found.items())


class Report:
    """What is known so far, written anew with each addition.

    Args:
        recogniser: the one whose figures decide.
        folder: where solvers.md and solvers.png go.
        docs: also into docs/.
    """

    def __init__(self, laboratory: Laboratory, recogniser: str, folder: Path, docs: bool) -> None:
        self.laboratory, self.recogniser, self.folder, self.docs = laboratory, recogniser, folder, docs
        self.proofs: dict[str, list[Trial]] = {}
        self.references: dict[str, Trial] = {}
        self.distances: dict[str, dict[Candidate, float]] = {}
        self.full: dict[str, list[Trial]] = {}  # the reference first
        self.ancestrals: dict[str, Trial] = {}

    def proof(self, arm: str, trials: Sequence[Trial], reference: Trial | None) -> None:
        self.proofs[arm], self.references[arm] = list(trials), reference or trials[0]
        self.write()

    def screened(self, arm: str, candidate: Candidate, distance: float) -> None:
        self.distances.setdefault(arm, {})[candidate] = distance

    def converged(self, arm: str, reference: Trial) -> None:
        self.full[arm] = [reference]
        self.write()

    def finished(self, arm: str, trial: Trial) -> None:
        if arm in self.full and all(trial.candidate != other.candidate for other in self.full[arm]):
            self.full[arm].append(trial)
            self.write()

    def ancestral(self, arm: str, trial: Trial) -> None:
        self.ancestrals[arm] = trial
        self.write()

    def write(self) -> None:
        text = "\n".join([f"Measured on {self.laboratory.kind}, fp32; figures by {self.recogniser}.", "",
                          *self.proof_table(), *self.full_tables(), *self.screening_table()]) + "\n"
        write_text(self.folder / "solvers.md", text)
        figure = self.plot()
        save_figure(figure, self.folder / "solvers.png")
        if self.docs:
            documents.write_between("docs/solvers.md", "solvers",
                                    f"{text}\n![Distance to the converged solver](demo/solvers.png)\n")
            save_figure(figure, documents.ROOT / "docs" / "demo" / "solvers.png")

    # ---- tables ------------------------------------------------------------------------------------------------------

    def proof_table(self) -> list[str]:
        """How far the solvers of the limit are from one another; DDPM, whose images are others, beside them."""
        lines = ["## The deterministic limit", "",
                 "| guidance | solver | images | rms distance of latents to each | FDR | genuine | impostor | agrees |",
                 "|---|---|---|---|---|---|---|---|"]
        for arm, trials in self.proofs.items():
            for trial in trials:
                others = [other for other in trials if other is not trial]
                apart = ", ".join(f"{trial.distance(other):.4f} ({other.candidate})" for other in others)
                agreeing = sum(agree(trial, other, self.recogniser) for other in others)
                chosen = ", the reference" if trial is self.references[arm] else ""
                lines.append(self._row([arm, str(trial.candidate), str(trial.images), apart, *self._short(trial),
                                        f"with {agreeing} of {len(others)}{chosen}"]))
            if arm in self.ancestrals:
                trial = self.ancestrals[arm]
                lines.append(self._row([arm, str(trial.candidate), str(trial.images), "", *self._short(trial), ""]))
        return [*lines, ""]

    def full_tables(self) -> list[str]:
        """Figures of the finalists, and their differences from the reference."""
        if not self.full:
            return []
        figures = ["## Figures", "", "| guidance | solver | passes: one, both | GFLOP | distance | "
                   + " | ".join(NAMES[name] for name in METRICS + AGAINST_REAL) + " | detected | s an image | processor |",
                   "|" + "---|" * (len(METRICS + AGAINST_REAL) + 8)]
        apart = ["## Differences from the converged solver", "", "Paired by identity and noise, with 90% intervals; FDR and "
                 "genuine std as parts of the reference's. Margins: "
                 + ", ".join(f"{NAMES[name]} +-{margin:g}" for name, margin in MARGINS.items()) + ".", "",
                 "| guidance | solver | GFLOP | " + " | ".join(NAMES[name] for name in MARGINS) + " | equivalent |",
                 "|" + "---|" * (len(MARGINS) + 4)]
        for arm, trials in self.full.items():
            for trial in sorted(trials, key=lambda one: -self.laboratory.cost(arm, one.candidate)):
                cost, passes = self.laboratory.cost(arm, trial.candidate), self.laboratory.passes(arm, trial.candidate)
                cells = [arm, str(trial.candidate), f"{passes['one']}, {passes['both']}", f"{cost:.1f}",
                         f"{trial.distance(trials[0]):.4f}"]
                cells += [self._with_interval(trial, name) for name in METRICS + AGAINST_REAL]
                figures.append(self._row([*cells, f"{trial.found.mean():.1%}", f"{trial.seconds:.3f}", self.laboratory.kind]))
                if trial is not trials[0]:
                    found = differences(trial, trials[0], self.recogniser)
                    cells = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*found[name]) if name in found else "" for name in MARGINS]
                    verdict = "yes" if is_equivalent(trial, trials[0], self.recogniser) else "no"
                    apart.append(self._row([arm, str(trial.candidate), f"{cost:.1f}", *cells, verdict]))
        return [*figures, "", *apart, ""]

    def screening_table(self) -> list[str]:
        """Distance of the latents by solver and spacing (rows) and steps (columns)."""
        lines = ["## Screening", "", "Rms distance of the latents of 64 images to the reference's, as a part of their standard "
                 "deviation.", ""]
        for arm, distances in self.distances.items():
            steps = sorted({candidate.steps for candidate in distances})
            pairs = dict.fromkeys((candidate.solver, candidate.spacing) for candidate in distances)
            lines += [f"| {arm} | " + " | ".join(map(str, steps)) + " |", "|" + "---|" * (len(steps) + 1)]
            for solver, spacing in pairs:
                cells = [distances.get(Candidate(solver, number, spacing)) for number in steps]
                lines.append(self._row([f"{solver} {spacing}", *("" if cell is None else f"{cell:.3f}" for cell in cells)]))
            lines.append("")
        return lines if self.distances else []

    def plot(self) -> Figure:
        """Distance by steps, the best spacing of each solver; and the FDR's difference by cost, with its margin."""
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        if self.distances:
            arm, distances = next(iter(self.distances.items()))
            for solver in dict.fromkeys(candidate.solver for candidate in distances):
                steps = sorted({candidate.steps for candidate in distances if candidate.solver == solver})
                lowest = [min(value for one, value in distances.items() if (one.solver, one.steps) == (solver, number))
                          for number in steps]
                left.loglog(steps, lowest, marker=".", label=solver)
            left.set(xlabel="steps", ylabel="rms distance of latents, in their std", title=f"{arm}: best spacing of each solver")
            left.legend(fontsize="small")
        for number, (arm, trials) in enumerate(self.full.items()):
            for trial in trials[1:]:
                if found := differences(trial, trials[0], self.recogniser):
                    value, low, high = found["fdr"]
                    cost = self.laboratory.cost(arm, trial.candidate)
                    right.errorbar(cost, value, [[value - low], [high - value]], color=f"C{number}", marker="o")
                    right.annotate(str(trial.candidate), (cost, value), fontsize=6, xytext=(3, 3), textcoords="offset points")
            right.plot([], [], color=f"C{number}", label=arm)
        right.axhspan(-MARGINS["fdr"], MARGINS["fdr"], color="grey", alpha=0.2, label="margin")
        right.set(xlabel="GFLOP an image", ylabel="FDR less the reference's, as a part of it", title="90% intervals")
        right.legend(fontsize="small")
        return figure

    def _short(self, trial: Trial) -> list[str]:
        values = trial.metrics[self.recogniser]
        return [f"{values['fdr']:.3f}", f"{values['genuine_mean']:.3f}", f"{values['impostor_mean']:.3f}"]

    def _with_interval(self, trial: Trial, name: str) -> str:
        value, replicates = trial.metrics[self.recogniser].get(name), trial.replicates[self.recogniser].get(name)
        if value is None:
            return ""
        if replicates is None or np.isnan(replicates).all():
            return f"{value:.3f}"
        return "{:.3f} ({:.3f} to {:.3f})".format(value, *interval(replicates))

    @staticmethod
    def _row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"
