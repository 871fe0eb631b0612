"""Which solver, in how many steps, and which negative passes can be left out? Judged by nearness to the converged solver.

Writes  <output>/solvers/<kind of guidance>/<images>/<solver>.npz: each trial, kept as it goes; run again, it goes on
        <output>/solvers/solvers.md, solvers.png: rewritten as trials are added; with --docs docs/solvers.md too

    python -m experiments.solvers scores.recogniser=data/mobilefacenet_independent.ncnn.param
    python -m experiments.solvers --minutes 75 --docs scores.recogniser=...
    python -m experiments.solvers fit                             # writes the numbers of the solver `fitted`

For each kind of guidance: first the deterministic limit (DDIM in 200 and 400 steps, DPM++ in 100 and 200) is shown to be reached,
and the cheapest that agrees is the reference. Then all candidates are screened by the distance of their latents to it, and the
best six, the default, the earlier one and rules with fewer negative passes get full figures. DDPM and SDE solvers, whose images
are others, come last. fp32; trials of another kind of processor are made anew.
"""
import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import places
from config.config import Config, Sampling
from config.load import load_config
from experiments.demo import stage
from experiments.options import parse
from experiments.solver_fit import TEACHER, fit
from experiments.solver_report import Report, choose_reference
from experiments.solver_trials import ARMS, Candidate, Images, Laboratory, Trial
from models.published import backbone_digest, load_backbone
from utils.diffusion.fitted import FITTED
from utils.recognition.scorer import Scorer, real_faces
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import require_file

PROOF, SCREEN = Images(24, 6), Images(16, 4)  # the second are among the first, so that the reference is there already
# DDIM's error halves as its steps double, so that two of it may agree some way from the limit; DPM++'s falls faster.
REFERENCES = (Candidate("dpm++", 100), Candidate("dpm++", 200), Candidate("ddim", 200), Candidate("ddim", 400))
SOLVERS = ("unipc", "dpm++", "unipc3", "deis3", "deis", "ddim")
SPACINGS = ("linspace", "log_snr", "trailing", "karras")
STEPS = (10, 8, 12, 15, 6, 20, 25, 30, 5, 50)  # likely winners first
PAIRS = 6  # solvers and spacings that are screened in every number of steps, after all were in the first
NEAR = 12  # steps: the best six are those nearest to it
INTERVALS = ((200, 999), (0, 600))
RULES = ("every2", "every3")
DEFAULT = Candidate(Sampling().solver, Sampling().steps)
EARLIER = Candidate("dpm++", 15, "linspace")  # the default before there was a study
OTHERS = (Candidate("dpm++sde", 20), Candidate("dpm++sde", 50))  # other images, compared by figures alone
ANCESTRAL = Candidate("ddpm", 1000)
RATES = (150, 250)  # GFLOP/s in fp32 that two cores were seen to give


def main() -> None:
    options, settings = arguments()
    if options.what == "fit":  # to weights that the default solver does not know yet
        settings += [f"sampling.solver={TEACHER.solver}", f"sampling.steps={TEACHER.steps}"]
    config = load_config(__doc__, reads=("paths", "contexts", "model", "sampling", "align", "scores"),
                         arguments=[*settings, "sampling.precision=fp32", "negatives.strategy=far"])
    embedded = Path("models/demo/recogniser.safetensors")
    recognisers = list(dict.fromkeys([Path(config.scores.recogniser), embedded]))  # the first one decides
    for file in recognisers:
        require_file(file, "scores.recogniser", "give the weights of a recogniser")
    for script in ("create_sample_identity_contexts", "create_negative_contexts"):
        stage(script, *settings, "negatives.strategy=far")
    device = distributed.setup(config.device).device
    if options.what == "fit":
        return fit(Laboratory(config, recognisers, device, config.sampling.seed + 1))
    laboratory = Laboratory(config, recognisers, device, config.sampling.seed, real_halves(config, recognisers, device))
    if options.identities > len(laboratory.contexts):
        raise UserError(f"--identities: {options.identities} is more than the {len(laboratory.contexts)} contexts; lower it")
    study = Study(laboratory, options, Report(laboratory, recognisers[0].stem, places.solvers_folder(config), options.docs))
    study.run()
    print(f"written to {study.report.folder}" + ("" if not study.skipped else f"; {len(study.skipped)} trials did not fit into "
          f"{options.minutes:g} minutes (the first: {study.skipped[0]}): run the same command again"))


def real_halves(config: Config, recognisers: Sequence[Path], device: torch.device) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By recogniser, the two halves of the real faces of scores.real, for coverage and recall; none where it is empty."""
    if not config.scores.real:
        return {}
    found = {}
    for file in recognisers:
        scorer = Scorer(load_backbone(file), backbone_digest(file), device)
        of_file = replace(config, scores=replace(config.scores, recogniser=str(file)))
        found[file.stem], _ = real_faces(Path(config.scores.real), places.real_embeddings(of_file), scorer, {"arcface"})
    return found


def arguments() -> tuple[argparse.Namespace, list[str]]:
    def names(known: Sequence[str]):
        def split(text: str) -> tuple[str, ...]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
            return tuple(text.split(","))
        return split

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "fit"), default="measure")
    parser.add_argument("--minutes", type=float, default=600, help="begin no trial that would not end within them")
    parser.add_argument("--identities", type=int, default=100, help="of the full figures")
    parser.add_argument("--images", type=int, default=8, help="of each identity")
    parser.add_argument("--arms", type=names(tuple(ARMS)), default=tuple(ARMS), help="kinds of guidance, in this order")
    parser.add_argument("--solvers", type=names(SOLVERS), default=(), help="candidates, besides the fitted one")
    parser.add_argument("--steps", type=lambda text: tuple(map(int, text.split(","))), default=STEPS)
    parser.add_argument("--best", type=int, default=6, help="how many of those screened get full figures")
    parser.add_argument("--docs", action="store_true", help="write the tables and the plot into docs/ too")
    return parse(parser)


class Study:
    """The trials in their order, within a budget of time."""

    def __init__(self, laboratory: Laboratory, options: argparse.Namespace, report: Report) -> None:
        self.laboratory, self.options, self.report = laboratory, options, report
        self.full = Images(options.identities, options.images)
        self.begun, self.rate, self.skipped, self.done = time.monotonic(), float(RATES[0]), [], {}
        self.finalists: list[Candidate] = []

    def run(self) -> None:
        self.estimate()
        for arm in self.options.arms:
            proof = [self.trial(arm, candidate, PROOF, True) for candidate in REFERENCES]
            if None in proof:
                continue
            reference = choose_reference(proof, self.report.recogniser, lambda one: self.laboratory.cost(arm, one.candidate))
            self.report.proof(arm, proof, reference)
            if reference is None:
                print(f"{arm}: no two of {', '.join(map(str, REFERENCES))} agree, so nothing can be compared with a converged "
                      "solver; the finest stands in")
                reference = proof[0]
            if not self.finalists:  # the same ones for every kind of guidance
                self.finalists = self.screen(arm, reference)
            converged = self.trial(arm, reference.candidate, self.full, True)
            if converged is None:
                continue
            self.report.converged(arm, converged)
            for candidate in dict.fromkeys([*self.finalists, DEFAULT, EARLIER, *with_fewer_passes(arm)]):
                self.finish(arm, candidate)
        for arm in self.options.arms:
            if arm in self.report.references:
                self.screen(arm, self.report.references[arm], left_out=True)
                for candidate in OTHERS:
                    self.finish(arm, candidate)
        for arm in self.options.arms:
            if (trial := self.trial(arm, ANCESTRAL, PROOF, True)) is not None:
                self.report.ancestral(arm, trial)

    def trial(self, arm: str, candidate: Candidate, images: Images, scored: bool) -> Trial | None:
        """A trial, if it is made already or there is time for it."""
        key = arm, candidate, images, scored
        if key not in self.done:
            gflop = len(images) * (self.laboratory.cost(arm, candidate) + scored * self.laboratory.gflop["decode"])
            begun, is_made = time.monotonic(), self.laboratory.is_made(*key)
            if not is_made and begun - self.begun + gflop / self.rate > 60 * self.options.minutes:
                self.skipped.append(f"{arm}, {candidate}, {images}")
                return None
            self.done[key] = self.laboratory.trial(*key)
            if not is_made:  # detection and embedding count too: the estimate is of the clock
                self.rate += (gflop / (time.monotonic() - begun) - self.rate) / 2
        return self.done[key]

    def screen(self, arm: str, reference: Trial, left_out: bool = False) -> list[Candidate]:
        """The candidates that get full figures: of each number of steps the nearest, NEAR steps first."""
        nearest: dict[int, tuple[float, Candidate]] = {}
        distances: dict[Candidate, float] = {}
        for candidate in self.candidates(distances, left_out):
            if (trial := self.trial(arm, candidate, SCREEN, False)) is None:
                continue
            distance = distances[candidate] = trial.distance(reference)
            self.report.screened(arm, candidate, distance)
            if distance < nearest.get(candidate.steps, (float("inf"),))[0]:
                nearest[candidate.steps] = distance, candidate
        self.report.write()
        order = sorted(nearest, key=lambda steps: abs(steps / NEAR - 1) if steps > NEAR else abs(NEAR / steps - 1))
        return [nearest[steps][1] for steps in order[: self.options.best]]

    def candidates(self, distances: dict[Candidate, float], left_out: bool) -> Iterator[Candidate]:
        """Every pair of solver and spacing in the first number of steps, the best of them in all; then those left out."""
        first, *others = self.options.steps
        pairs = [Candidate(solver, first, spacing) for solver in self.options.solvers or SOLVERS for spacing in SPACINGS]
        yield from pairs
        yield from (Candidate("fitted", steps) for steps in FITTED)
        pairs.sort(key=lambda candidate: distances.get(candidate, float("inf")))
        for some in (pairs[:PAIRS], pairs[PAIRS:])[: 1 + left_out]:
            yield from (replace(candidate, steps=steps) for steps in others for candidate in some)

    def finish(self, arm: str, candidate: Candidate) -> None:
        """Full figures."""
        if (trial := self.trial(arm, candidate, self.full, True)) is not None:
            self.report.finished(arm, trial)

    def estimate(self) -> None:
        """What all of it will take, before it is begun."""
        cost, images, total = self.laboratory.cost, len(self.full), 0.0
        steps, pairs = self.options.steps, len(self.options.solvers or SOLVERS) * len(SPACINGS)
        for arm in self.options.arms:
            one = cost(arm, Candidate("dpm++", 100)) / 100
            parts = {"the limit shown": len(PROOF) * sum(cost(arm, candidate) for candidate in REFERENCES),
                     "screening": len(SCREEN) * pairs * sum(steps) * one, "reference": images * 100 * one,
                     "full figures": images * one * (sum(sorted(steps, key=lambda n: abs(n - NEAR))[: self.options.best]) + 15),
                     "fewer passes": images * one * NEAR * 3 * (ARMS[arm].w > 0),
                     "SDE and DDPM": images * 70 * one + len(PROOF) * cost(arm, ANCESTRAL)}
            total += sum(parts.values())
            print(f"{arm}: {one:.2f} GFLOP a step and image; TFLOP: "
                  + ", ".join(f"{name} {value / 1e3:.0f}" for name, value in parts.items()))
        slow, fast = (total / rate / 60 for rate in RATES)
        print(f"all: {total / 1e3:.0f} TFLOP, {fast:.0f} to {slow:.0f} min at {RATES[1]} to {RATES[0]} GFLOP/s, besides "
              f"decoding, detection and embedding; at most {self.options.minutes:g} min now; {self.laboratory.kind}", flush=True)


def with_fewer_passes(arm: str) -> list[Candidate]:
    """The default with fewer negative passes."""
    if ARMS[arm].w == 0:
        return []
    rules = [replace(DEFAULT, rule=rule) for rule in RULES]
    return rules + [replace(DEFAULT, interval=interval) for interval in INTERVALS if ARMS[arm].schedule == "constant"]


if __name__ == "__main__":
    run_script(main)
