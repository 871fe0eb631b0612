"""Timesteps fitted to a teacher, as in USF (arXiv 2312.07243) and S4S (arXiv 2502.17423): searched one at a time.

The loss is the rms distance of the latents to those of the teacher, DPM++ in 100 steps, of w = 0 and Far-Neg together.
The images are of another seed than those of the table.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import places
from experiments.solver_trials import Candidate, Images, Laboratory
from utils.diffusion.spacings import SPACINGS
from utils.runtime.files import read_json, write_json

TEACHER, IMAGES = Candidate("dpm++", 100), Images(32, 1)
ARMS, STEPS = ("far", "w0"), (6, 8, 10)
SUBSET = 8  # images, drawn anew each round
MOVES = (0.5, 0.25, 0.12, 0.06)  # of the gap to the neighbour, a round each


def fit(laboratory: Laboratory, names: Sequence[str]) -> None:
    """Print FITTED's entries for these solvers; those already found are in <output>/solvers/fitted.json."""
    file = places.solvers_folder(laboratory.config) / "fitted.json"
    found = read_json(file) if file.is_file() else {}
    teacher = np.stack([laboratory.trial(arm, TEACHER, IMAGES, False).latents for arm in ARMS])
    for name in names:
        for steps in STEPS:
            if f"{name} {steps}" not in found:
                found[f"{name} {steps}"] = search(laboratory, name, steps, teacher)
                write_json(file, found)
    report(file, found)


def search(laboratory: Laboratory, solver: str, steps: int, teacher: np.ndarray) -> dict:
    """The best spacing, then each timestep moved by parts of the gap to its neighbours wherever the loss falls.

    Args:
        teacher: latents [ARMS, images, C, h, w].
    """
    numbers, random = IMAGES.numbers(), np.random.default_rng(0)

    def loss(timesteps: Sequence[int], rows: Sequence[int]) -> float:
        batch = [numbers[row] for row in rows]
        drawn = np.stack([laboratory.latents(arm, Candidate(solver, steps), batch, timesteps).cpu().numpy() for arm in ARMS])
        return float(np.sqrt(np.square(drawn - teacher[:, rows]).mean()) / teacher.std())

    everything = list(range(len(numbers)))
    spaced = {name: laboratory.timesteps(Candidate(solver, steps, name)) for name in SPACINGS if name != "fitted"}
    subset = random.permutation(len(numbers))[:SUBSET]
    start = min(spaced, key=lambda name: loss(spaced[name], subset))
    best = spaced[start]
    for move in tqdm(MOVES, desc=f"{solver} in {steps}", unit="round"):
        subset = random.permutation(len(numbers))[:SUBSET]
        lowest = loss(best, subset)
        for place in random.permutation(steps):
            for other in neighbours(best, int(place), move, laboratory.model.T):
                if (value := loss(other, subset)) < lowest:
                    lowest, best = value, other
    return {"timesteps": best, "start": start, "loss at the start": loss(spaced[start], everything),
            "loss": loss(best, everything)}


def neighbours(timesteps: Sequence[int], place: int, move: float, T: int) -> list[list[int]]:
    """The two lists in which one timestep is moved by a part of the gap to the one before and after; both still fall."""
    padded, found = [T, *timesteps, -1], []
    for side in (place, place + 2):
        gap = padded[side] - timesteps[place]
        step = round(move * gap) or int(np.sign(gap))
        if abs(step) < abs(gap):
            found.append([*timesteps[:place], timesteps[place] + step, *timesteps[place + 1 :]])
    return found


def report(file: Path, found: dict) -> None:
    for name, entry in found.items():
        solver, steps = name.split()
        print(f'("{solver}", {steps}): ({", ".join(map(str, entry["timesteps"]))}),  # {entry["loss"]:.4f}; '
              f'{entry["start"]}: {entry["loss at the start"]:.4f}')
    print(f"kept in {file}: put them into FITTED of utils/diffusion/spacings.py")
