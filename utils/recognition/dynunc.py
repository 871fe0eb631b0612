"""DynUnc: keep the training images whose predicted probability moves most during training.

He et al., Large-scale Dataset Pruning with Dynamic Uncertainty (CVPRW 2024, arXiv 2306.05175).
"""
import warnings
from pathlib import Path

import numpy as np
import torch

from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, write_npz, write_text
from utils.runtime.foreign_arrays import reading, require_regular

WINDOW = 10  # J, epochs
KEEP_FRACTIONS = (0.9, 0.75, 0.5)  # of the images
COLUMN_BLOCK = 65536


def dynamic_uncertainty(probabilities: np.ndarray, window: int = 10) -> np.ndarray:
    """The standard deviation (ddof 1) within every `window` successive epochs, averaged over these windows.

    An image has NaN at an epoch that did not show it (the last partial batch is dropped). A window's deviation is
    that of the epochs that showed the image; a window with fewer than two of them is left out of the average.

    Args:
        probabilities: [epochs, N], of each image's class, in [0, 1]; a memory map is read in blocks of columns.
    Returns:
        [N] float64.
    Raises:
        UserError: fewer epochs than the window, or an image that no window shows twice.
    """
    epochs, images = probabilities.shape
    if not 2 <= window <= epochs:
        raise UserError(f"DynUnc window: is {window} epochs and {epochs} are recorded; set 2 or more, and train at "
                        "least as long")
    uncertainty = np.empty(images)
    for start in range(0, images, COLUMN_BLOCK):
        columns = slice(start, start + COLUMN_BLOCK)
        p = np.asarray(probabilities[:, columns], dtype=np.float64)
        with warnings.catch_warnings():
            # numpy warns of images seen less than twice; they stay NaN and are refused below.
            warnings.simplefilter("ignore", RuntimeWarning)
            deviations = [np.nanstd(p[j : j + window], axis=0, ddof=1) for j in range(epochs - window + 1)]
            uncertainty[columns] = np.nanmean(deviations, axis=0)
    unmeasured = np.flatnonzero(~np.isfinite(uncertainty))
    if unmeasured.size:
        raise UserError(f"DynUnc probabilities: {unmeasured.size} images, the first is image {unmeasured[0]}, were "
                        f"never seen twice within {window} epochs; train longer or widen the window")
    return uncertainty


def keep_list(scores: np.ndarray, fraction: float) -> np.ndarray:
    """The images of the highest scores; among equal scores those that come first.

    Args:
        scores: [N], finite.
        fraction: the share to keep, in (0, 1]: round(fraction * N) images, at least one.
    Returns:
        Their indices, int64, increasing.
    """
    kept = max(1, round(fraction * len(scores)))
    return np.sort(np.argsort(-scores, kind="stable")[:kept])


# ---- files -----------------------------------------------------------------------------------------------------------

def open_probabilities(file: Path, epochs: int, images: int, done: int) -> np.ndarray:
    """The memory map [epochs or more, N] float32 of each image's probability of its class, NaN where not recorded.

    A file of fewer epochs grows and keeps its rows.

    Raises:
        UserError: the file is damaged, or lacks one of the `done` epochs that have been trained.
    """
    fix = "put it back, or begin under another fr.name"
    earlier = np.empty((0, images), np.float32)
    if file.exists():
        require_regular(file)
        with reading(file, "an array of probabilities", fix):
            earlier = np.load(file, allow_pickle=False, mmap_mode="r")
            if earlier.dtype != np.float32 or earlier.ndim != 2 or earlier.shape[1] != images:
                raise ValueError(f"it is {earlier.dtype} {earlier.shape}, not float32 of {images} images")
    if len(earlier) < done or not np.isfinite(earlier[:done]).any(axis=1).all():
        raise UserError(f"{file}: lacks the probabilities of epochs that have been trained; {fix}")
    if len(earlier) < epochs:
        rows = np.full((epochs, images), np.nan, np.float32)
        rows[:len(earlier)] = earlier
        with atomic_write(file) as temporary, open(temporary, "wb") as array:
            np.save(array, rows, allow_pickle=False)
    return np.load(file, allow_pickle=False, mmap_mode="r+")


def write_epoch(probabilities: np.ndarray, epoch: int, probability: torch.Tensor, dropped: np.ndarray) -> None:
    """Take an epoch's probability of each image [N] over, but of those that were dropped, and set it to zero for the next."""
    probabilities[epoch] = probability.cpu()
    probabilities[epoch, dropped] = np.nan
    probabilities.flush()
    probability.zero_()


def write_dynunc(folder: Path, probabilities: np.ndarray, paths: np.ndarray) -> list[Path]:
    """Write `dynunc_scores.npz` (paths, scores [N]) and a keep-list, the paths to keep, for each of KEEP_FRACTIONS.

    Args:
        probabilities: [epochs, N]; fewer epochs than WINDOW are one window.
        paths: [N] `<identity>/<image>`.
    Returns:
        The keep-lists' files.
    """
    scores = dynamic_uncertainty(probabilities, min(WINDOW, len(probabilities)))
    write_npz(folder / "dynunc_scores.npz", paths=paths, scores=scores)
    files = []
    for fraction in KEEP_FRACTIONS:
        files.append(folder / f"keep_{fraction:g}.txt")
        write_text(files[-1], "".join(f"{path}\n" for path in paths[keep_list(scores, fraction)]))
    return files
