"""Runs beside one another as pictures: their scores, how their images vary, their faces."""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config import places
from utils.evaluation import variety
from utils.evaluation.measures import Scored
from utils.evaluation.tables import VARIETY
from utils.faces.aligned import read_kept
from utils.runtime.figures import montage

PLOTTED = ("genuine_std", "vendi", "distance", *variety.AGAINST_REAL)
FEW_PAIRS = 10_000  # a run of fewer genuine pairs is plotted in wider bins, which would else be all spikes
FACES = (4, 6)  # identities and images of each in the picture of all runs


def plot_scores(results: Sequence[Scored]) -> Figure:
    """Genuine (filled) and impostor (dashed) densities of every run, one colour each; below them how its images vary."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4.5, 2))
    axes = above.subplots()
    bins = 50 if min(result.metrics["genuine_pairs"] for result in results) < FEW_PAIRS else 200
    edges = np.linspace(-1, 1, bins + 1)
    for number, result in enumerate(results):
        genuine, impostor = (counts.reshape(bins, -1).sum(axis=1) / counts.sum() * bins / 2
                             for counts in (result.distributions.genuine_counts, result.distributions.impostor_counts))
        color = f"C{number}"
        axes.stairs(genuine, edges, color=color, fill=True, alpha=0.1)
        axes.stairs(genuine, edges, color=color, linewidth=1.5, label=f"{result.run.name}: FDR {result.metrics['fdr']:.2f}")
        axes.stairs(impostor, edges, color=color, linestyle="--")
    axes.set(xlabel="cosine similarity", ylabel="density", xlim=(-0.5, 1),
             title="genuine (filled) and impostor (dashed) scores")
    axes.legend(fontsize="small")
    names = [name for name in PLOTTED if name in results[0].metrics]
    for axes, name in zip(below.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _plot_figure(axes, name, [result.metrics for result in results])
    return figure


def _plot_figure(axes: Axes, name: str, all_metrics: Sequence[dict]) -> None:
    """One figure of every run with its interval; dotted, what real faces have."""
    for number, metrics in enumerate(all_metrics):
        limits = metrics.get("intervals", {}).get(name, (metrics[name],) * 2)
        axes.vlines(number, *limits, color=f"C{number}")
        axes.plot(number, metrics[name], "o", color=f"C{number}", markersize=4)
        if f"real_{name}" in metrics:
            axes.axhline(metrics[f"real_{name}"], color="black", linestyle=":", linewidth=1)
    counts = {metrics["vendi_images"] for metrics in all_metrics}
    of = f" of {counts.pop()}" if name == "vendi" and len(counts) == 1 else ""
    axes.set_title(f"{VARIETY[name]}{of}", fontsize="small")
    axes.set(xticks=[], xlim=(-0.5, len(all_metrics) - 0.5))
    axes.tick_params(labelsize="small")


def plot_faces(folders: Sequence[Path]) -> Figure | None:
    """A panel for each run: a row for each of the first identities, the same ones in every panel; None if none is shared."""
    kept = [read_kept(places.aligned(folder)) for folder in folders]
    names = sorted(set(kept[0]).intersection(*kept))[:FACES[0]]
    if not names:
        return None
    columns = math.ceil(len(folders) / 2) if len(folders) > 3 else len(folders)
    figure = Figure(figsize=(4 * columns, 3.2 * math.ceil(len(folders) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(folders) / columns), columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, folder, faces in zip(panels, folders, kept, strict=False):
        axes.imshow(montage([faces[name][: FACES[1]] for name in names], FACES[1]))
        axes.set_title(folder.name)
    return figure
