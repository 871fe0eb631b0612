"""Condition annealing: contexts that are noisy early in sampling (CADS, arXiv 2310.17347)."""
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

TAU = 0.6, 0.9  # tau_1 and tau_2, as parts of T; 0.6 is what CADS finds best, neither is tuned here


def gamma(t: int, T: int) -> float:
    """How much of the context is left at timestep t: 0 above tau_2 T, 1 below tau_1 T, linear between (equation 2)."""
    return min(max((TAU[1] - t / T) / (TAU[1] - TAU[0]), 0.0), 1.0)


def annealed(c: Tensor, t: int, noise: Callable[[int], Tensor], T: int, scale: float) -> Tensor:
    """c_t = sqrt(gamma(t)) c + s sqrt(1 - gamma(t)) n / sqrt(D), brought back to unit norm (equation 1; psi = 1).

    With 1/sqrt(D) the noise is as long as a context at s = 1. Where gamma is 0, the direction is the noise's alone.

    Args:
        c: contexts [B, D], unit norm.
        noise: t -> standard normal values [B, D], from each image's own stream.
        T: number of timesteps.
        scale: s > 0.
    Returns:
        [B, D], unit norm; c itself where gamma is 1, whose tokens are then computed once.
    """
    kept = gamma(t, T)
    if kept == 1:
        return c
    return F.normalize(kept**0.5 * c + scale * (1 - kept) ** 0.5 * noise(t) / c.shape[1] ** 0.5, dim=1)
