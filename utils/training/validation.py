"""How good a generator and a first stage in training are, by held-out people and the recogniser of the contexts."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from models.autoencoder import Autoencoder
from utils.diffusion.guidance import unguided
from utils.diffusion.latent_diffusion import LatentDiffusion, to_uint8
from utils.diffusion.noise import gaussian
from utils.evaluation.reconstruction import reconstruction_errors
from utils.evaluation.scores import metrics, score_distributions
from utils.runtime.figures import contact_sheet, save_figure

IMAGES, SOLVER, STEPS, BATCH = 4, "dpm++", 15, 64
SHEET = (8, 4)
RECONSTRUCTED = 12  # faces on the sheet of the first stage


def held_out_scores(model: LatentDiffusion, contexts: np.ndarray, embeddings_of: Callable[[torch.Tensor], torch.Tensor],
                    seed: int, sheet: Path) -> dict[str, float]:
    """FDR, genuine and impostor mean of some images of each person, drawn with w = 0.

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


@torch.no_grad()
def reconstruction_scores(autoencoder: Autoencoder, batches: Iterable[torch.Tensor], embeddings_of: Callable[[torch.Tensor],
                          torch.Tensor], quantised: bool, bf16: bool, sheet: Path) -> dict[str, float]:
    """The pixels' mean absolute difference (of 2), the mean cosine of embeddings, and reconstruction_errors.

    Args:
        batches: images [B, 3, H, W] in [-1, 1].
        embeddings_of: such images -> embeddings [B, D].
        quantised: decode the nearest codes; else the latents themselves.
        sheet: where some of the images go, above their reconstructions.
    """
    reconstructions, cosines = [], []
    for images in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            decoded = autoencoder.decode(autoencoder.encode(images).float(), quantised).clamp(-1, 1)
            reconstructions.append((images.cpu(), decoded.float().cpu()))
            cosines.append(F.cosine_similarity(embeddings_of(images), embeddings_of(decoded)))
    images, decoded = (torch.cat(parts) for parts in zip(*reconstructions, strict=True))
    contact_sheet([to_uint8(row[:RECONSTRUCTED]).numpy() for row in (images, decoded)], sheet)
    error = (decoded - images).abs().mean().item()
    return {"pixel_error": error, "cosine": torch.cat(cosines).mean().item(), **reconstruction_errors(images, decoded)}


def plot_curves(log: Sequence[Mapping[str, float | None]], file: Path) -> None:
    """Loss and FDR over the minutes, from the rows of a run's log."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, column, title in zip(figure.subplots(1, 2), ("loss", "fdr"), ("loss", "FDR on held-out people, w = 0"),
                                   strict=True):
        points = [(row["minutes"], row[column]) for row in log if row.get(column) is not None]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker="." if column == "fdr" else "")
        axes.set(title=title, xlabel="minutes", yscale="log" if column == "loss" and points else "linear")
    save_figure(figure, file)
