"""Curves as inline SVG: the numbers that the template draws, and those that it shows on hover and focus."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.scores import ScoreDistributions, error_rates

WIDTH, HEIGHT = 1000, 400  # of the SVG's own coordinates, which stretch with the page
LABEL = 0.015, 0.06  # width of a letter and height of a line, as parts of the plot on a desktop
SCORE = "cosine similarity"
POINTS = 200  # of a density, over the cosines from -1 to 1


@dataclass(frozen=True)
class Series:
    """One run's curves over a chart's x."""

    name: str  # its label
    run: int  # which gives it its colour
    lines: Sequence[np.ndarray]  # what is drawn, each [N]; all but the first are dashed
    columns: Sequence[Sequence[str]]  # what is shown at each x, as texts, a list [N] for each of the chart's columns


def chart(title: str, x: np.ndarray, series: Sequence[Series], columns: Sequence[str], x_label: str, y_label: str,
          start: int) -> dict:
    """What the template needs to draw curves over x [N], N >= 1, ascending; `start` is the place first shown."""
    finite = np.concatenate([line[np.isfinite(line)] for one in series for line in one.lines])
    low, high = min(0.0, finite.min(initial=0)), finite.max(initial=0) * 1.12 or 1.0
    span = float(x[-1] - x[0]) or 1.0

    def across(value: float) -> float:
        return (value - float(x[0])) / span

    def up(value: float) -> float:
        return 1 - (value - low) / (high - low)

    def path(line: np.ndarray) -> str:
        points = [f"{WIDTH * across(a):.1f},{HEIGHT * up(b):.1f}" for a, b in zip(x, line, strict=True) if math.isfinite(b)]
        return "M" + "L".join(points) if points else ""

    return {
        "title": title, "x_label": x_label, "y_label": y_label, "columns": columns, "start": start,
        "x_ticks": [(100 * across(value), f"{value:g}") for value in ticks(float(x[0]), float(x[-1]), whole=x_label != SCORE)],
        "y_ticks": [(100 * up(value), f"{value:g}") for value in ticks(low, high)],
        "series": [{"name": one.name, "run": one.run, "paths": [path(line) for line in one.lines]} for one in series],
        "labels": labels([(one.name, one.run, across(x[np.nanargmax(one.lines[0])]), up(np.nanmax(one.lines[0])))
                          for one in series if np.isfinite(one.lines[0]).any()]),
        "values": {"x": [f"{value:.4g}" for value in x], "at": [round(100 * across(value), 2) for value in x],
                   "rows": [one.columns for one in series]}}


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round (or whole) numbers within [low, high], some `most` of them at most."""
    rough = max((high - low) / most or 1.0, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labels(peaks: Sequence[tuple[str, int, float, float]]) -> list[dict]:
    """Names beside their curves' highest points (name, run, x, y in 0..1), moved up until none covers another."""
    placed: list[tuple[float, float, float]] = []
    texts = []
    for name, run, x, y in sorted(peaks, key=lambda peak: -peak[3]):
        width, top = LABEL[0] * len(name), y - LABEL[1]
        while any(abs(x - at) < (width + wide) / 2 and abs(top - height) < LABEL[1] for at, height, wide in placed):
            top -= LABEL[1] / 4
        placed.append((x, top, width))
        texts.append({"name": name, "run": run, "left": 100 * min(max(x, width / 2), 1 - width / 2),
                      "top": 100 * top})
    return texts


def distributions(scores: Sequence[tuple[str, int, ScoreDistributions]]) -> dict:
    """The overlaid genuine and impostor densities of runs (name, number, scores); start is the first run's EER."""
    centres = np.linspace(-1, 1, 2 * POINTS + 1)[1::2]
    lines = [(density(one.genuine_counts, one.genuine_std), density(one.impostor_counts, one.impostor_std))
             for _, _, one in scores]
    seen = np.flatnonzero(np.max(lines, axis=(0, 1)) > 0.01)
    shown, series, start = slice(seen[0], seen[-1] + 1), [], 0
    for (name, run, one), both in zip(scores, lines, strict=True):
        both = [line[shown] for line in both]
        rates = [rate[np.round((centres[shown] + 1) / 2 * (len(rate) - 1)).astype(int)] for rate in error_rates(one)]
        start = start or int(np.argmin(np.abs(rates[0] - rates[1])))
        series.append(Series(name, run, both, [[f"{value:.2f}" for value in line] for line in both]
                             + [[f"{100 * value:.1f}%" for value in rate] for rate in rates]))
    return chart("Genuine and impostor scores", centres[shown], series, ("genuine", "impostor", "FMR", "FNMR"),
                 SCORE, "density", start)


def density(counts: np.ndarray, std: float) -> np.ndarray:
    """The density [POINTS] of scores in -1..1 counted in bins: a Gaussian kernel of Silverman's width (1986, eq. 3.31)."""
    coarse = counts.reshape(POINTS, -1).sum(axis=1)
    width = max(0.9 * float(std) * coarse.sum() ** -0.2 * POINTS / 2, 0.5)
    kernel = np.exp(-0.5 * (np.arange(1 - POINTS, POINTS) / width) ** 2)
    return np.convolve(coarse, kernel / kernel.sum(), "valid") / coarse.sum() * POINTS / 2


def training_curves(logs: Sequence[tuple[str, int, Sequence[dict[str, float]]]], column: str) -> dict:
    """One column of training logs (name, run, rows) over the epochs, or over the steps where there are none."""
    by = "epoch" if all("epoch" in row for _, _, rows in logs for row in rows) else "step"
    x = np.array(sorted({row[by] for _, _, rows in logs for row in rows if by in row}))
    series = []
    for name, run, rows in logs:
        values = {row[by]: row[column] for row in rows if by in row and column in row}
        line = np.array([values.get(at, np.nan) for at in x])
        series.append(Series(name, run, [line], [["" if math.isnan(value) else f"{value:.4g}" for value in line]]))
    title = column.replace("_", " ")
    return chart(title.capitalize(), x, series, (title,), by, title, len(x) - 1)
