"""Perturbed contexts: each image of an identity from a context of its own, inside a cone (IDperturb, arXiv 2602.18831)."""
import numpy as np

from utils.identities.contexts import crowding
from utils.runtime.errors import UserError


def perturbed(contexts: np.ndarray, lowest: np.ndarray, uniform: np.ndarray, noise: np.ndarray,
              root: np.ndarray | None = None) -> np.ndarray:
    """v' = c v + sqrt(1 - c^2) n, with c ~ U[lb, 1] and n a random unit vector at a right angle to v: [B, D] float32.

    Args:
        contexts: v, [B, D], unit norm.
        lowest: lb, [B].
        uniform: [B], between 0 and 1; noise: [B, D], standard normal: both from each image's own stream.
        root: [D, D], of the covariance of n; None: isotropic.
    """
    v = contexts.astype(np.float64)
    c = (lowest + (1 - lowest) * uniform)[:, None]
    n = noise.astype(np.float64)
    if root is not None:
        n = np.stack([root @ row for row in n])  # row by row: a product of all rounds otherwise with other rows beside it
    n -= np.vecdot(n, v)[:, None] * v
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    return (c * v + np.sqrt(1 - c**2) * n).astype(np.float32)


def lowest_cosines(contexts: np.ndarray, base: float, safe: bool) -> np.ndarray:
    """lb of each context, [N]: `base`; safe: at least the cosine of half the angle to the nearest other context.

    lb_i = max(base, max_j sqrt((1 + v_i . v_j) / 2)): then no image's context is nearer to another identity's than to its own.
    """
    half = np.sqrt((1 + crowding(contexts).astype(np.float64)) / 2) if safe else np.zeros(len(contexts))
    return np.maximum(base, half)


def covariance_root(contexts: np.ndarray) -> np.ndarray:
    """The symmetric square root of the contexts' covariance, [D, D] float64, of which there is one only.

    Raises:
        UserError: the contexts differ along one line only.
    """
    values, axes = np.linalg.eigh(np.cov(contexts.astype(np.float64).T))
    if values[-2] < 1e-9 * values[-1]:
        raise UserError(f"variety.cone_noise: {len(contexts)} contexts have too few directions for their covariance; set "
                        "variety.cone_noise=isotropic")
    return (axes * np.sqrt(values.clip(min=0))) @ axes.T
