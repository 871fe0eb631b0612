"""Do images of one identity vary, and do all of them cover real faces? Figures beside FDR, which falls as variety grows.

Everything is of unit embeddings, in float64, and in blocks: memory does not grow with the pairs.
"""
import contextlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from utils.evaluation.scores import draw_identities, unit_rows
from utils.runtime.errors import UserError

BLOCK = 1024  # identities whose kernels are in memory at once
NEAREST = 5  # k of coverage and recall, as in arXiv 2002.09797
MOST_FACES = 10_000  # of each kind: coverage and recall take three float64 matrices of this size squared, 0.8 GB each
HALVINGS = 20  # random ways to part the identities in two, for intervals of what is measured against real faces
T_QUANTILE = 1.729  # 95% of Student's t with HALVINGS - 1 degrees of freedom
AGAINST_REAL = ("coverage", "recall", "frechet")
DRAWS = 20  # of both sets anew: unlimited_frechet_distance

Halves = tuple[np.ndarray, np.ndarray]


# ---- within an identity ----------------------------------------------------------------------------------------------

def within_identity(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """How the images of each identity vary, from the same number of images of each.

    That number n is the (lower) median over the identities with two or more images; the first n of each are taken, and
    identities with fewer are left out, so that a few lost faces do not change what is measured.

    Args:
        embeddings: [N, D], of any norm, an identity's in their order.
        labels: [N], the identity of each row; one of them has two images.
    Returns:
        By name, [C] float64 over the sorted identities, NaN where one is left out:
        vendi: Vendi score (arXiv 2210.02410), exp of the entropy of the eigenvalues of the cosine kernel / n: 1 where all
            images are alike, n where they are orthogonal.
        distance: mean Euclidean distance of two images, 0 to 2.
        And n.
    Raises:
        UserError: a row is zero or not finite.
    """
    x, (_, identity, counts) = unit_rows(embeddings), np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    several = np.sort(counts[counts > 1])
    n = int(several[(len(several) - 1) // 2])
    rows = np.argsort(identity, kind="stable")
    first = np.cumsum(counts) - counts
    chosen = np.flatnonzero(counts >= n)
    values = {name: np.full(len(counts), np.nan) for name in ("vendi", "distance")}
    for start in range(0, len(chosen), BLOCK):
        block = chosen[start : start + BLOCK]
        own = x[rows[first[block, None] + np.arange(n)]]
        kernels = own @ own.transpose(0, 2, 1)
        eigenvalues = np.linalg.eigvalsh(kernels / n).clip(0, 1)
        logarithms = np.log(eigenvalues, where=eigenvalues > 0, out=np.zeros_like(eigenvalues))
        values["vendi"][block] = np.exp(-(eigenvalues * logarithms).sum(axis=1))
        pairs = kernels[:, *np.triu_indices(n, 1)]
        values["distance"][block] = np.sqrt((2 - 2 * pairs).clip(0)).mean(axis=1)
    return values, n


def resampled_mean(values: np.ndarray, replicates: int, seed: int = 0) -> np.ndarray:
    """The mean over identities [C] under the resampling of `scores.bootstrap`, [replicates]; NaN identities do not count."""
    weights = draw_identities(len(values), replicates, seed) * ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # a replicate of left-out identities alone is NaN
        return weights @ np.nan_to_num(values) / weights.sum(axis=1)


# ---- against real faces ----------------------------------------------------------------------------------------------

def require_prdc() -> None:
    """Raises UserError where the package of coverage and recall is missing."""
    try:
        import prdc  # noqa: F401
    except ImportError:
        raise UserError("scores.real: coverage and recall need the package prdc; pip install -c constraints.txt prdc") from None


def halves(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray) -> Halves:
    """Unit embeddings of real faces [M, D] in two parts, every other identity in each.

    Raises:
        UserError: a row is zero or not finite, or there is one identity only.
    """
    x, (names, identity) = unit_rows(embeddings, "real faces"), np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        raise UserError("scores.real: there is one identity only; give the faces of more people, to tell them in two halves")
    order = np.argsort(identity, kind="stable")
    first = identity[order] % 2 == 0
    return x[order[first]], x[order[~first]]


def against_real(embeddings: ArrayLike, labels: Sequence[str] | np.ndarray, real: Halves
                 ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Coverage, recall and Frechet distance of generated faces, and those that real faces of other people would have.

    All three depend on how many faces there are. So the same number n of generated faces and of each half of the real
    ones is compared, evenly spread over the identities: the largest possible, at most MOST_FACES. A figure is the mean
    over the two halves; `real_<name>` takes one half for the generated faces of the other: the floor of the distance, the
    ceiling of the others.

    Args:
        embeddings: [N, D], of any norm; labels: [N], the identity of each row.
        real: the two `halves` of the real faces.
    Returns:
        The figures, each with its `real_` counterpart: coverage (arXiv 2002.09797) and recall (arXiv 1904.06991), by the
        package prdc with k = NEAREST, in [0, 1]; frechet, the squared Frechet distance of the two normal distributions;
        and `real_faces`, n.
        And each of AGAINST_REAL of random halves of the identities, [2 HALVINGS], for `half_sample_interval`; empty where
        there are fewer than 2 (k + 2) identities.
    Raises:
        UserError: a row is zero or not finite, or there are too few faces for k neighbours.
    """
    x, (names, identity) = unit_rows(embeddings), np.unique(np.asarray(labels), return_inverse=True)
    order = np.argsort(identity, kind="stable")
    n = min(MOST_FACES, len(x), *map(len, real))
    chosen = order[spread(len(x), n)]
    if n < NEAREST + 2:
        raise UserError(f"scores.real: {len(x)} generated and {len(real[0])} + {len(real[1])} real faces (two halves) are too "
                        f"few for {NEAREST} nearest neighbours; give {NEAREST + 2} or more of each")
    first, second = (half[spread(len(half), n)] for half in real)
    floor = _mean([compare(first, second), compare(second, first)])
    figures = _mean([compare(x[chosen], first), compare(x[chosen], second)])
    figures |= {f"real_{name}": value for name, value in floor.items()} | {"real_faces": n}
    if len(names) < 2 * (NEAREST + 2) or len(np.unique(identity[chosen])) < len(names):
        return figures, {}
    random = np.random.default_rng(0)
    in_first = [random.permutation(len(names))[identity[chosen]] < len(names) / 2 for _ in range(HALVINGS)]
    of_halves = [_mean([compare(x[chosen[rows]], first), compare(x[chosen[rows]], second)]) for rows in tqdm(
        [rows for part in in_first for rows in (part, ~part)], desc="against real faces", unit="half", delay=1)]
    return figures, {name: np.array([row[name] for row in of_halves]) for name in AGAINST_REAL}


def half_sample_interval(estimate: float, of_halves: np.ndarray) -> tuple[float, float]:
    """The 90% interval of a figure from its values of random halves of the identities [2 HALVINGS].

    The variance over halves is that of the whole: the jackknife that leaves out half (Shao, Wu, Annals of Statistics 17,
    1989). One that leaves out a few does not converge for figures that count nearest neighbours, and resampling with
    replacement leaves holes in what is covered. The real faces are fixed.
    """
    error = T_QUANTILE * float(np.std(of_halves))
    return estimate - error, estimate + error


def compare(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Coverage, recall and Frechet distance of generated faces [N, D] against real ones [M, D], float64."""
    from prdc import compute_prdc  # only here, since the rest of the project does without it
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many there are
        figures = compute_prdc(real_features=real, fake_features=generated, nearest_k=NEAREST)
    return {"coverage": float(figures["coverage"]), "recall": float(figures["recall"]),
            "frechet": frechet_distance(generated, real)}


def spread(length: int, number: int) -> np.ndarray:
    """`number` of the rows 0 .. length - 1, evenly spread."""
    return np.arange(number) * length // number


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S the covariances, of two sets [N, D] and [M, D]."""
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # root_a S_b root_a is symmetric and has the eigenvalues of S_a S_b
    product = np.linalg.eigvalsh(root @ s_b @ root).clip(0)
    distance = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(s_a) + np.trace(s_b) - 2 * np.sqrt(product).sum()
    return float(max(distance, 0.0))


def unlimited_frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets [N, D] and [M, D], without what it is too high by for want of samples.

    Sets drawn anew from these, with repetition, look farther apart than these by about as much as these do than what they were
    drawn from (the bootstrap's estimate of bias: Efron, Tibshirani 1993, chapter 10). Of Gaussians like face embeddings (D =
    128) it was right to 0.02 for N, M >= 2 D, and up to 0.1 too high below that. It may come out below zero by chance.

    Args:
        a, b: of any norm; unit rows are compared.
    Raises:
        UserError: a row is zero or not finite.
    """
    a, b, random = unit_rows(a), unit_rows(b), np.random.default_rng(0)
    anew = [frechet_distance(*(rows[random.integers(len(rows), size=len(rows))] for rows in (a, b))) for _ in range(DRAWS)]
    return 2 * frechet_distance(a, b) - float(np.mean(anew))


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
