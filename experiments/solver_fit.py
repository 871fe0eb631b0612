"""A multistep solver of few steps fitted to a teacher (S4S, arXiv 2502.17423), without training: by least squares.

At each step the teacher's next x is regressed on x_t and all predictions of x_0, those of the solver as fitted so far; a
solver of any order is such a weighted sum. The timesteps are searched one at a time among the teacher's (as in USF,
arXiv 2312.07243). The images are of another seed than those that are measured, and of w = 0 and both kinds of guidance.
"""
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import utils.diffusion.fitted as written
from config import places
from experiments.solver_trials import ARMS, Candidate, Laboratory
from utils.diffusion import guidance, solvers, spacings
from utils.diffusion.noise import gaussian
from utils.runtime.files import read_json, write_json, write_text
from utils.runtime.records import Record, State

TEACHER, STEPS = Candidate("dpm++", 100), (8, 10, 6, 12)
SEARCHED, REGRESSED, HELD_OUT = range(2), range(24), range(24, 32)  # images, each of another identity
RIDGE = 1e-7  # of the features' mean square: they are nearly collinear
MOVES = (0.4, 0.2)  # of the gap to the neighbour, a round each


@dataclass(frozen=True)
class Path:
    """A teacher's way: its denoise(x_t, t), and x_t [B, C, h, w] at each of its timesteps, x_0 at -1."""

    denoise: Callable[[Tensor, int], Tensor]
    x: dict[int, Tensor]


@torch.inference_mode()
def fit(laboratory: Laboratory) -> None:
    """Write <output>/solvers/fitted.py, to be put into the place of utils/diffusion/fitted.py; run again, it goes on."""
    folder, levels, paths = places.solvers_folder(laboratory.config), laboratory.model.alpha_bars, []
    decides = laboratory.decides | {"teacher": laboratory.timesteps(TEACHER), "images": [list(SEARCHED), list(REGRESSED)]}
    for steps in STEPS:
        file = folder / "fitted" / f"{steps}.json"
        record = Record(file.with_name(f"{steps}.record.json"), decides, target=file)
        if record.state() is State.DONE:
            continue
        searched, regressed, held_out = paths = paths or [walk(laboratory, rows) for rows in (SEARCHED, REGRESSED, HELD_OUT)]
        timesteps = search(searched, steps, laboratory)
        numbers, _ = regress(regressed, timesteps, levels)
        drawn = [solvers.fitted(path.denoise, path.x[timesteps[0]], timesteps, None, laboratory.model.betas, numbers)
                 for path in held_out]
        record.begin()
        write_json(file, {"numbers": numbers, "held_out": dict(zip(ARMS, rms(drawn, held_out), strict=True))})
    entries = {steps: read_json(folder / "fitted" / f"{steps}.json") for steps in sorted(STEPS)}
    for steps, entry in entries.items():
        print(f"{steps} steps, rms distance of latents to the teacher's, held out: "
              + ", ".join(f"{arm} {value:.4f}" for arm, value in entry["held_out"].items()))
    write_text(folder / "fitted.py", source({steps: entry["numbers"] for steps, entry in entries.items()},
                                            weights=laboratory.decides["weights"][1]))
    print(f"{folder / 'fitted.py'}: put it into the place of utils/diffusion/fitted.py")


def walk(laboratory: Laboratory, identities: Sequence[int]) -> list[Path]:
    """The teacher's way of an image of each identity, for each of ARMS."""
    paths, rows = [], list(identities)
    x_T = gaussian(laboratory.seed, rows, [0] * len(rows), laboratory.model.T, laboratory.model.latent_shape, laboratory.device)
    for settings in tqdm(ARMS.values(), desc="teacher", unit="guidance"):
        guide = guidance.guided(**asdict(settings))

        # the contexts of this batch, bound now: each path is walked again later
        def denoise(x_t, t, start=guide, contexts=laboratory.contexts[rows], negatives=laboratory.negatives[rows]):
            return start(laboratory.model, contexts, negatives)(x_t, t)

        x: dict[int, Tensor] = {}
        x[-1] = solvers.sample(lambda x_t, t: x.setdefault(t, x_t) is None or denoise(x_t, t), x_T, TEACHER.solver,
                               laboratory.timesteps(TEACHER), None, False, laboratory.model.betas)
        paths.append(Path(denoise, x))
    return paths


def regress(paths: Sequence[Path], timesteps: Sequence[int], alpha_bars: Sequence[float]
            ) -> tuple[list[tuple[float, ...]], list[Tensor]]:
    """The weights of each step (as in FITTED), one after another, and the x_0 that they give; each path counts the same."""
    x, seen, numbers = [path.x[timesteps[0]] for path in paths], [[] for _ in paths], []
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha, sigma = alpha_bars[t] ** 0.5, (1 - alpha_bars[t]) ** 0.5
        for path, x_t, predictions in zip(paths, x, seen, strict=True):
            predictions.insert(0, (x_t - sigma * path.denoise(x_t, t)) / alpha)
        features = [torch.stack([x_t, *predictions]).flatten(1).double()
                    for x_t, predictions in zip(x, seen, strict=True)]
        gram = sum(rows @ rows.T for rows in features)
        moment = sum(rows @ path.x[t_next].flatten().double() for rows, path in zip(features, paths, strict=True))
        gram += RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = [float(f"{weight:.6g}") for weight in torch.linalg.solve(gram, moment).tolist()]
        numbers.append((t, *weights))
        x = [sum(weight * row for weight, row in zip(weights, rows, strict=True)).float().view_as(x_t)
             for rows, x_t in zip(features, x, strict=True)]
    return numbers, x


def search(paths: Sequence[Path], steps: int, laboratory: Laboratory) -> list[int]:
    """The teacher's timesteps nearest to the best of some spacings, then each moved wherever the loss falls."""
    levels, known = laboratory.model.alpha_bars, sorted((t for t in paths[0].x if t >= 0), reverse=True)

    def loss(timesteps: Sequence[int]) -> float:
        return max(rms(regress(paths, timesteps, levels)[1], paths))

    starts = [np.linspace(known[0], known[-1], steps), *(
        spacings.SPACINGS[name](steps, levels) for name in ("linspace", "karras", "log_snr"))]
    best = min((nearest(start, known) for start in starts), key=loss)
    lowest = loss(best)
    for move in tqdm(MOVES, desc=f"{steps} steps", unit="round"):
        for place in range(1, steps):  # the first one is T - 1
            for other in neighbours(best, place, move, known):
                if (value := loss(other)) < lowest:
                    lowest, best = value, other
    return best


def nearest(timesteps: Sequence[float], known: Sequence[int]) -> list[int]:
    """As many of the `known` timesteps as near as can be, none twice; both fall."""
    places = [int(np.abs(np.array(known) - t).argmin()) for t in timesteps]
    places = np.maximum.accumulate(np.array(places) - np.arange(len(places))) + np.arange(len(places))
    places = np.minimum(places, len(known) - len(places) + np.arange(len(places)))
    return [known[place] for place in places]


def neighbours(timesteps: Sequence[int], place: int, move: float, known: Sequence[int]) -> list[list[int]]:
    """The lists in which one timestep is moved by a part of the gap to the one before or after, among the `known`."""
    places = [-1, *(known.index(t) for t in timesteps), len(known)]
    found = []
    for side in (place, place + 2):
        gap = places[side] - places[place + 1]
        step = round(move * gap) or int(np.sign(gap))
        if abs(step) < abs(gap):
            found.append([*timesteps[:place], known[places[place + 1] + step], *timesteps[place + 1 :]])
    return found


def rms(drawn: Sequence[Tensor], paths: Sequence[Path]) -> list[float]:
    """The rms distance of each x_0 to its teacher's, as a part of the teacher's standard deviation."""
    return [((x_0 - path.x[-1]).square().mean().sqrt() / path.x[-1].std()).item() for x_0, path in zip(drawn, paths, strict=True)]


def source(entries: Mapping[int, Sequence[Sequence[float]]], weights: str) -> str:
    """utils/diffusion/fitted.py with these numbers and the digest of the weights."""
    lines = [f'"""{written.__doc__}"""', f'WEIGHTS = "{weights}"  # digest of their file',
             "FITTED: dict[int, tuple[tuple[float, ...], ...]] = {"]
    for steps, numbers in entries.items():
        lines += [f"    {steps}: (", *(wrapped(f"({', '.join(map(repr, row))}),") for row in numbers), "    ),"]
    return "\n".join([*lines, "}", ""])


def wrapped(row: str) -> str:
    return textwrap.fill(row, 128, initial_indent=8 * " ", subsequent_indent=9 * " ")
