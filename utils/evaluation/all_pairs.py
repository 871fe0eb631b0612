"""TAR at FAR over all pairs of a set of faces, with intervals over its identities.

The protocols of chosen pairs (verification.py) stop at a FAR of 1% or so: 3,000 impostor pairs. All pairs of LFW hold 87
million (as in BLUFR, Liao et al. 2014), of which the 87,000 most alike decide the threshold at a FAR of 0.1%.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from utils.evaluation.scores import (
    BINS,
    MIN_BOOTSTRAP_IDENTITIES,
    ScoreDistributions,
    block_pairs,
    by_identity,
    draw_identities,
    error_rates,
    interval,
    score_distributions,
)

FAR = (1e-2, 1e-3, 1e-4)
FEWEST = 100  # impostor pairs that a FAR accepts; fewer say too little
TAIL = 4_000_000  # at most, impostor pairs that are kept for the intervals, the most alike: 16 bytes each
MARGIN = 2  # times as many as the highest FAR accepts: a replicate may need more of them, and then has no interval


@dataclass(frozen=True)
class TarAtFar:
    genuine_pairs: int
    impostor_pairs: int
    tar: dict[float, float]  # by FAR, those of FAR at which FEWEST impostor pairs or more are accepted; in [0, 1]
    intervals: dict[float, tuple[float, float]]  # 90%, by FAR; empty for few identities


@dataclass(frozen=True)
class _Scores:
    """Scores in descending order, and the numbers of the identities of each pair."""

    score: np.ndarray  # [P] float64
    identities: np.ndarray  # [P, 1] int32 (genuine) or [P, 2] (impostor)


def tar_at_far(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray, replicates: int = 1000, seed: int = 0,
               device: torch.device | str = "cpu") -> TarAtFar:
    """The share of genuine pairs that is accepted where at most `far` of the impostor pairs is, for each FAR.

    Thresholds lie at the edges of histograms 2 / BINS wide (scores.py), the lowest whose FAR is small enough. The intervals
    are those of identities drawn with replacement (`scores.bootstrap`): an identity drawn w times gives its genuine pairs
    the weight w and its impostor pairs with one drawn v times the weight w v, and each replicate has a threshold of its own,
    exact among the most similar impostor pairs, of which one to four million are kept. A FAR whose threshold lies below those
    in some replicate has no interval (1e-2 of more than some 300 million pairs). Not resampled are the images within an
    identity and the recogniser's training; weights that are products overstate the spread a little (arXiv 1106.2125).

    Args:
        embeddings: [N, D], of any norm.
        labels: [N], the identity of each row.
        device: where the products run; it holds N x D float64 and some blocks of scores.BLOCK squared.
    Raises:
        UserError: a row is zero or not finite, or there is no genuine or no impostor pair.
    """
    distributions = score_distributions(embeddings, labels, device)
    fmr, fnmr = error_rates(distributions)
    genuine_pairs, impostor_pairs = (int(counts.sum()) for counts in (distributions.genuine_counts,
                                                                      distributions.impostor_counts))
    tar = {far: float(1 - fnmr[np.argmax(fmr <= far)]) for far in FAR if far * impostor_pairs >= FEWEST}
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    intervals = {}
    if tar and len(counts) >= MIN_BOOTSTRAP_IDENTITIES:
        x, identity, _ = by_identity(embeddings, labels, device)
        rates = resampled_tar(_genuine(x, identity), _most_similar_impostors(x, identity, distributions), counts, tuple(tar),
                              draw_identities(len(counts), replicates, seed))
        intervals = {far: interval(values) for far, values in zip(tar, rates.T, strict=True) if not np.isinf(values).any()}
    return TarAtFar(genuine_pairs, impostor_pairs, tar, intervals)


def tar_name(far: float) -> str:
    return f"TAR@1e-{round(-math.log10(far))}"


def resampled_tar(genuine: _Scores, impostor: _Scores, counts: np.ndarray, far: Sequence[float], draws: np.ndarray
                  ) -> np.ndarray:
    """TAR at each FAR when identity c, which has counts[c] images, is drawn draws[r, c] times: [R, len(far)].

    Args:
        impostor: the most similar impostor pairs; all others are less alike.
    Returns:
        Infinity where a threshold lies below those pairs, NaN where a replicate has no genuine or no impostor pair.
    """
    rates = np.full((len(draws), len(far)), np.inf)
    for r, weights in enumerate(tqdm(draws, desc="TAR at FAR, resampled", unit="replicate", delay=1)):
        images = weights * counts
        pairs = (images.sum() ** 2 - np.square(images).sum()) / 2
        accepted = np.cumsum(weights[impostor.identities[:, 0]] * weights[impostor.identities[:, 1]])
        matched = np.cumsum(weights[genuine.identities[:, 0]])
        if not pairs or not matched[-1:].any():
            rates[r] = np.nan
            continue
        allowed = np.floor(np.array(far) * pairs + 1e-6)  # 1% of 200 is 2, whatever rounding says
        first_beyond = np.searchsorted(accepted, allowed, side="right")  # its score and lower ones are refused
        within = first_beyond < len(accepted)
        thresholds = impostor.score[first_beyond[within]]
        above = np.searchsorted(-genuine.score, -thresholds, side="left")
        rates[r, within] = np.concatenate(([0], matched))[above] / matched[-1]
    return rates


def _genuine(x: torch.Tensor, identity: np.ndarray) -> _Scores:
    """All genuine pairs of unit rows sorted by identity."""
    scores, identities = [], []
    starts = np.searchsorted(identity, np.arange(identity[-1] + 2))
    for c in range(identity[-1] + 1):
        own = x[starts[c] : starts[c + 1]]
        if len(own) > 1:
            i, j = torch.triu_indices(len(own), len(own), offset=1, device=x.device)
            scores.append((own @ own.T)[i, j].cpu().numpy())
            identities.append(np.full((len(scores[-1]), 1), c, dtype=np.int32))
    return _in_order(scores, identities)


def _most_similar_impostors(x: torch.Tensor, identity: np.ndarray, distributions: ScoreDistributions) -> _Scores:
    """The impostor pairs in the highest bins that hold no more of them than TAIL, or than MARGIN asks for."""
    above = np.cumsum(distributions.impostor_counts[::-1])
    kept = min(TAIL, max(TAIL // 4, MARGIN * max(FAR) * above[-1]))
    bins = int(np.searchsorted(above, kept, side="right"))
    lowest = 1 - bins * 2 / BINS if bins < BINS else -np.inf
    label = torch.from_numpy(identity).to(x.device, torch.int32)
    scores, identities = [], []
    for rows, columns in tqdm(list(block_pairs(len(x))), desc="most similar impostors", unit="block", delay=1):
        products = x[rows] @ x[columns].T
        i, j = torch.nonzero(products >= lowest, as_tuple=True)
        once = label[rows][i] < label[columns][j]  # rows are sorted by identity: the other half of a block on the diagonal
        i, j = i[once], j[once]
        scores.append(products[i, j].cpu().numpy())
        identities.append(torch.stack((label[rows][i], label[columns][j]), dim=1).cpu().numpy())
    return _in_order(scores, identities)


def _in_order(scores: list[np.ndarray], identities: list[np.ndarray]) -> _Scores:
    score = np.concatenate(scores)
    order = np.argsort(-score, kind="stable")
    return _Scores(score[order], np.concatenate(identities)[order])
