"""Genuine and impostor score distributions over all pairs of images, and what is read from them.

A score is the cosine of two embeddings; a pair is genuine when both images show one identity, impostor otherwise.
Every pair is counted once, in blocks of a matrix product, so memory grows with the images and not with the pairs.
Everything is computed in float64, so two machines, or a CPU and a GPU, give one table.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from utils.runtime.errors import UserError
from utils.runtime.files import read_npz

# A bin is 1e-5 wide. Rates read at bin edges differ from the raw ones by the share of scores inside one bin: some
# 1e-4 even for a distribution with a standard deviation of 0.03.
BINS = 200_000
BLOCK = 4096

# Resampling keeps a histogram for every identity and replicate; between these wider bins it interpolates.
BOOTSTRAP_BINS = 500
MIN_BOOTSTRAP_IDENTITIES = 10

# Below this a variance of cosines is what float64 leaves of zero.
NO_VARIANCE = 1e-13


@dataclass(frozen=True)
class ScoreDistributions:
    """Histograms over [-1, 1] in BINS equal bins (closed below, the last one also above), and exact moments.

    Standard deviations are those of the population (ddof 0).
    """

    genuine_counts: np.ndarray  # [BINS] int64
    impostor_counts: np.ndarray  # [BINS] int64
    genuine_mean: float
    genuine_std: float
    impostor_mean: float
    impostor_std: float


def read_distributions(path: Path | str) -> ScoreDistributions:
    """Those of an .npz file with one array for each field. Raises UserError where it is damaged or lacks one."""
    return ScoreDistributions(**read_npz(path, [field.name for field in fields(ScoreDistributions)]))


def unit_rows(embeddings: ArrayLike, name: str = "embeddings") -> np.ndarray:
    """Divide each embedding [N, D] by its norm; float64.

    Raises:
        UserError: the array is not [N, D], or a row is zero or not finite; the line begins with `name`.
    """
    rows = np.array(embeddings, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UserError(f"{name}: the shape is {list(rows.shape)}, not [N, D]; give one embedding a row")
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise UserError(f"{name}: {bad.size} of {len(rows)} rows are zero or not finite, the first is row {bad[0]}; "
                        "check the recogniser's weights and its input")
    rows /= norms[:, None]
    return rows


def score_distributions(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray,
                        device: torch.device | str = "cpu") -> ScoreDistributions:
    """The distributions of all genuine and all impostor pairs.

    Args:
        embeddings: [N, D], of any norm.
        labels: [N], the identity of each row.
        device: where the products run; it holds N x D float64 and some blocks of BLOCK x BLOCK.
    Raises:
        UserError: a row is zero or not finite, or there is no genuine or no impostor pair.
    """
    x, identity, _ = by_identity(embeddings, labels, device)
    if np.bincount(identity).max() < 2:
        raise UserError("labels: no identity has two images, so there is no genuine pair; give two or more images of "
                        "an identity")
    label = torch.from_numpy(identity).to(device)
    row = torch.arange(len(x), device=device)
    genuine, impostor = _Tally(device), _Tally(device)
    for rows, columns in tqdm(list(block_pairs(len(x))), desc="scores", unit="block", delay=1):
        scores = (x[rows] @ x[columns].T).clamp_(-1, 1)
        # Rows are sorted by identity: away from the diagonal a block holds impostor pairs only and needs no mask.
        if identity[rows][-1] < identity[columns][0]:
            impostor.add(scores)
            continue
        same = label[rows, None] == label[columns]
        once = row[rows, None] < row[columns]
        genuine.add(scores[once & same])
        impostor.add(scores[once & ~same])
    return ScoreDistributions(genuine.counts(), impostor.counts(), *genuine.moments(), *impostor.moments())


def error_rates(distributions: ScoreDistributions) -> tuple[np.ndarray, np.ndarray]:
    """FMR and FNMR [BINS + 1] when scores >= the threshold match, for thresholds at the bin edges from -1 to 1."""
    return _rates(distributions.genuine_counts, distributions.impostor_counts)


def metrics(distributions: ScoreDistributions) -> dict[str, float]:
    """The row of the paper's table.

    eer: where FMR = FNMR, on the straight line between neighbouring thresholds (so 0.5 when all scores are equal).
    fmr100, fmr1000: the lowest FNMR with FMR <= 1% and <= 0.1%.
    fdr: Fisher discriminant ratio (mean_g - mean_i)^2 / (std_g^2 + std_i^2), population standard deviations; 0 when
    all scores are equal.

    Raises:
        UserError: neither kind of score varies but the means differ, so that the FDR is infinite.
    """
    d = distributions
    fmr, fnmr = error_rates(d)
    variance = float(d.genuine_std**2 + d.impostor_std**2)
    separation = float(d.genuine_mean - d.impostor_mean) ** 2
    if variance < NO_VARIANCE < separation:
        raise UserError("embeddings: all genuine scores are equal and so are all impostor scores, so the FDR is "
                        "infinite; give images that are not copies of one another")
    return {
        "eer": _eer(fmr, fnmr),
        "fmr100": float(fnmr[np.argmax(fmr <= 0.01)]),
        "fmr1000": float(fnmr[np.argmax(fmr <= 0.001)]),
        "fdr": separation / variance if variance >= NO_VARIANCE else 0.0,
        "genuine_mean": float(d.genuine_mean),
        "genuine_std": float(d.genuine_std),
        "impostor_mean": float(d.impostor_mean),
        "impostor_std": float(d.impostor_std),
        "genuine_pairs": int(d.genuine_counts.sum()),
        "impostor_pairs": int(d.impostor_counts.sum()),
    }


def most_similar_identities(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray,
                            device: torch.device | str = "cpu") -> tuple[str, str, float]:
    """The two identities whose mean embeddings (of unit embeddings) have the highest cosine, and that cosine.

    Raises:
        UserError: a row is zero or not finite, or there is one identity only.
    """
    x, identity, names = by_identity(embeddings, labels, device)
    means = torch.zeros(len(names), x.shape[1], dtype=x.dtype, device=x.device)
    means.index_add_(0, torch.from_numpy(identity).to(device), x)
    means = torch.nn.functional.normalize(means)
    best = (-np.inf, 0, 0)
    for rows, columns in block_pairs(len(means)):
        cosines = means[rows] @ means[columns].T
        if rows == columns:
            cosines.fill_diagonal_(-np.inf)
        highest = int(cosines.argmax())
        a, b = divmod(highest, cosines.shape[1])
        best = max(best, (float(cosines[a, b]), rows.start + a, columns.start + b))
    cosine, a, b = best
    return str(names[a]), str(names[b]), cosine


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 90% percentile interval of replicates [R], those that are NaN left out."""
    return tuple(np.nanquantile(values, (0.05, 0.95)).tolist())


def draw_identities(identities: int, replicates: int, seed: int = 0) -> np.ndarray:
    """How often each identity is drawn when as many are drawn as there are, with replacement: [replicates, identities] int64."""
    return np.random.default_rng(seed).multinomial(identities, np.full(identities, 1 / identities), size=replicates)


def bootstrap(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray, replicates: int = 1000, seed: int = 0,
              device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
    """Every rate and moment of `metrics`, [replicates] float64, under resampling of the identities.

    A replicate draws as many identities as there are, with replacement, each with all its images. An identity drawn
    w times gives its genuine pairs the weight w, and its impostor pairs with one drawn v times the weight w * v; copies
    of one identity make no impostor pairs. The intervals tell how the numbers would move with other identities of the
    same kind; the images within an identity, the recogniser and the generator's training are not resampled.
    Rates are interpolated in histograms of BOOTSTRAP_BINS bins. Replicates without a genuine or an impostor pair are
    NaN. The same identities and seed give the same resamples, so that two sets of images can be compared. Meant for the
    subset: time grows with replicates x identities^2. Fewer than MIN_BOOTSTRAP_IDENTITIES say too little about others.
    """
    x, identity, names = by_identity(embeddings, labels, device)
    weights = torch.from_numpy(draw_identities(len(names), replicates, seed)).to(device, torch.float64)
    label = torch.from_numpy(identity).to(device)
    starts = np.searchsorted(identity, np.arange(len(names) + 1))
    genuine = torch.zeros(replicates, BOOTSTRAP_BINS + 2, dtype=torch.float64, device=device)
    impostor = torch.zeros_like(genuine)
    for c in tqdm(range(len(names)), desc="bootstrap", unit="identity", delay=1):
        start, stop = starts[c], starts[c + 1]
        own = x[start:stop] @ x[start:stop].T
        i, j = torch.triu_indices(*own.shape, offset=1, device=device)
        genuine += weights[:, c, None] * _statistics(own[i, j][None], torch.zeros_like(i), 1)
        others = x[start:stop] @ x[stop:].T
        impostor += weights[:, c, None] * (weights[:, c + 1 :]
                                           @ _statistics(others, label[stop:] - c - 1, len(names) - c - 1))
    rows = [_replicate_metrics(g, i) if g[:-2].any() and i[:-2].any() else {}
            for g, i in zip(genuine.cpu().numpy(), impostor.cpu().numpy(), strict=True)]
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in max(rows, key=len)}


# ---- pieces ----------------------------------------------------------------------------------------------------------

class _Tally:
    """Counts and sums of scores, kept on the device so that blocks need not wait for one another."""

    def __init__(self, device: torch.device | str):
        self._counts = torch.zeros(BINS, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, scores: torch.Tensor) -> None:
        scores = scores.flatten()
        self._counts += torch.histc(scores, BINS, -1, 1)
        self._sums += torch.stack((scores.sum(), scores @ scores))

    def counts(self) -> np.ndarray:
        return self._counts.long().cpu().numpy()

    def moments(self) -> tuple[float, float]:
        mean, mean_square = (self._sums / self._counts.sum()).tolist()
        return mean, max(mean_square - mean**2, 0.0) ** 0.5


def by_identity(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray, device: torch.device | str
                 ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Unit rows [N, D] sorted by identity (in its order, stable), each row's identity number [N], the names [C]."""
    names, identity = np.unique(np.asarray(labels), return_inverse=True)
    if len(identity) != len(embeddings):
        raise UserError(f"labels: {len(identity)} labels for {len(embeddings)} embeddings; give one for each row")
    if len(names) < 2:
        raise UserError(f"labels: there are {len(names)} identities, so there is no impostor pair; give two or more")
    order = np.argsort(identity, kind="stable")
    x = unit_rows(embeddings)[order]
    return torch.from_numpy(x).to(device), identity[order], names


def block_pairs(n: int) -> Iterator[tuple[slice, slice]]:
    """The blocks of an n x n matrix on and above the diagonal."""
    blocks = [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    for k, rows in enumerate(blocks):
        for columns in blocks[k:]:
            yield rows, columns


def _rates(genuine_counts: np.ndarray, impostor_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    below_g = np.concatenate(([0], np.cumsum(genuine_counts)))
    below_i = np.concatenate(([0], np.cumsum(impostor_counts)))
    # A count over a count: 2 of 200 impostors are 1%, while 1 - 198 / 200 is a rounding error more.
    return (below_i[-1] - below_i) / below_i[-1], below_g / below_g[-1]


def _eer(fmr: np.ndarray, fnmr: np.ndarray) -> float:
    gap = fmr - fnmr  # falls from 1 to -1
    k = int(np.argmax(gap <= 0))
    share = gap[k - 1] / (gap[k - 1] - gap[k])
    return float(fmr[k - 1] + share * (fmr[k] - fmr[k - 1]))


def _statistics(scores: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Of scores [n, m] whose columns belong to `group` [m]: histogram, sum, sum of squares, [groups, bins + 2]."""
    bins = ((scores + 1) * (BOOTSTRAP_BINS / 2)).long().clamp_(0, BOOTSTRAP_BINS - 1)
    flat = (bins + group * BOOTSTRAP_BINS).flatten()
    counts = torch.bincount(flat, minlength=groups * BOOTSTRAP_BINS).view(groups, BOOTSTRAP_BINS)
    sums = torch.zeros(groups, 2, dtype=scores.dtype, device=scores.device)
    sums.index_add_(0, group, torch.stack((scores.sum(0), scores.square().sum(0)), dim=1))
    return torch.cat((counts.to(scores.dtype), sums), dim=1)


def _replicate_metrics(genuine: np.ndarray, impostor: np.ndarray) -> dict[str, float]:
    """The metrics of one replicate from its weighted histogram, sum and sum of squares [bins + 2] of each kind."""
    fmr, fnmr = _rates(genuine[:-2], impostor[:-2])
    (mean_g, square_g), (mean_i, square_i) = (kind[-2:] / kind[:-2].sum() for kind in (genuine, impostor))
    variance_g, variance_i = max(square_g - mean_g**2, 0.0), max(square_i - mean_i**2, 0.0)
    return {
        "eer": _eer(fmr, fnmr),
        "fmr100": float(np.interp(0.01, fmr[::-1], fnmr[::-1])),
        "fmr1000": float(np.interp(0.001, fmr[::-1], fnmr[::-1])),
        "fdr": (mean_g - mean_i) ** 2 / max(variance_g + variance_i, NO_VARIANCE),
        "genuine_mean": mean_g,
        "genuine_std": variance_g**0.5,
        "impostor_mean": mean_i,
        "impostor_std": variance_i**0.5,
    }
