"""How good a generator in training is: images of held-out people, w = 0, scored by the recogniser of the contexts."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from utils.diffusion.guidance import unguided
from utils.diffusion.latent_diffusion import LatentDiffusion, to_uint8
from utils.diffusion.noise import gaussian
from utils.evaluation.scores import metrics, score_distributions
from utils.runtime.figures import contact_sheet, save_figure

IMAGES, SOLVER, STEPS, BATCH = 4, "dpm++", 15, 64
SHEET = (8, 4)


def held_out_scores(model: LatentDiffusion, contexts: np.ndarray, embeddings_of: Callable[[torch.Tensor], torch.Tensor],
                    seed: int, sheet: Path) -> dict[str, float]:
    """FDR, genuine and impostor mean of some images of each person.

    Args:
        contexts: [N, D] float32, of the held-out people.
        embeddings_of: images [B, 3, H, W] in [-1, 1] -> embeddings [B, D].
        sheet: where a contact sheet of the images goes.
    """
    labels = np.repeat(np.arange(len(contexts)), IMAGES)
    numbers = np.tile(np.arange(IMAGES), len(contexts))
    images, embeddings = [], []
    for part in np.array_split(np.arange(len(labels)), -(-len(labels) // BATCH)):
        which = (torch.from_numpy(names[part]).to(model.device) for names in (labels, numbers))
        noise = partial(gaussian, seed, *which, shape=model.latent_shape, device=model.device)
        images.append(model.images(torch.from_numpy(contexts[labels[part]]), None, noise, unguided, SOLVER, STEPS))
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16):
            embeddings.append(embeddings_of(images[-1]).float().cpu())
    found = metrics(score_distributions(torch.cat(embeddings).numpy(), labels))
    pixels = to_uint8(torch.cat(images)).cpu().numpy()
    contact_sheet(pixels.reshape(len(contexts), IMAGES, *pixels.shape[1:])[: SHEET[0], : SHEET[1]], sheet)
    return {"fdr": found["fdr"], "genuine": found["genuine_mean"], "impostor": found["impostor_mean"]}


def plot_curves(log: Sequence[Mapping[str, float | None]], file: Path) -> None:
    """Loss and FDR over the minutes, from the rows of a run's log."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, column, title in zip(figure.subplots(1, 2), ("loss", "fdr"), ("loss", "FDR on held-out people, w = 0"),
                                   strict=True):
        points = [(row["minutes"], row[column]) for row in log if row.get(column) is not None]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker="." if column == "fdr" else "")
        axes.set(title=title, xlabel="minutes", yscale="log" if column == "loss" and points else "linear")
    save_figure(figure, file)
