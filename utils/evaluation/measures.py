"""Everything that is measured of a run's faces, kept in the folder of its scores."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.evaluation import scores, variety
from utils.runtime.files import read_npz, write_json, write_npz
from utils.runtime.records import versions

BOOTSTRAP_IDENTITIES = 1000  # at most: the paper's subset; resampling takes time with their square


@dataclass(frozen=True)
class Scored:
    """A run, the folder of its scores, and what `measure` wrote there."""

    run: Path
    folder: Path
    distributions: scores.ScoreDistributions
    metrics: Mapping[str, Any]


def measure(folder: Path, embeddings: np.ndarray, labels: np.ndarray, real: variety.Halves | None, replicates: int,
            device: torch.device) -> None:
    """Write what there is to say of faces: histograms.npz, bootstrap.npz where there are few identities, metrics.json.

    Args:
        embeddings: [N, D], of any norm; labels: [N], the identity of each.
        real: `variety.halves` of real faces; None: they are compared with none.
        replicates: of the identities, for the 90% intervals.
    Raises:
        UserError: a row is zero or not finite, there is no genuine or no impostor pair, or there are too few real faces.
    """
    (folder / "bootstrap.npz").unlink(missing_ok=True)  # of other faces, of which there were few
    distributions, names = scores.score_distributions(embeddings, labels, device), np.unique(labels)
    within, images_each = variety.within_identity(embeddings, labels)
    metrics = scores.metrics(distributions) | {name: float(np.nanmean(values)) for name, values in within.items()}
    metrics |= {"vendi_images": images_each, "identities": len(names), "images": len(labels), "versions": versions(),
                "most_similar_identities": scores.most_similar_identities(embeddings, labels, device)}
    of_halves = {}
    if real:
        figures, of_halves = variety.against_real(embeddings, labels, real)
        metrics |= figures
    if len(names) >= scores.MIN_BOOTSTRAP_IDENTITIES:
        resampled = {name: variety.resampled_mean(values, replicates) for name, values in within.items()}
        if len(names) <= BOOTSTRAP_IDENTITIES:
            resampled |= scores.bootstrap(embeddings, labels, replicates, device=device)
            write_npz(folder / "bootstrap.npz", identities=names, **resampled,
                      **{f"of_halves_{name}": values for name, values in of_halves.items()})
        metrics["intervals"] = {name: scores.interval(values) for name, values in resampled.items()} | {
            name: variety.half_sample_interval(metrics[name], values) for name, values in of_halves.items()}
    write_npz(folder / "histograms.npz", **vars(distributions))
    write_json(folder / "metrics.json", metrics)  # last: where it exists, all of them do


def ratio_interval(first: Path, other: Path) -> tuple[float, float] | None:
    """The 90% interval of the FDR of a folder's scores over that of the first one's, if both are of the same identities."""
    files = [folder / "bootstrap.npz" for folder in (first, other)]
    if not all(file.is_file() for file in files):
        return None
    a, b = (read_npz(file, ("identities", "fdr")) for file in files)
    if not np.array_equal(a["identities"], b["identities"]) or a["fdr"].shape != b["fdr"].shape:
        return None
    return scores.interval(b["fdr"] / a["fdr"])
