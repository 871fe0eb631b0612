"""Equation 3 of NegFaceDiff (arXiv 2508.09661) and the schedules w(t)."""
from collections.abc import Callable

import torch

SCHEDULES = ("constant", "linear", "reverse", "interval")


def combine(eps_pos: torch.Tensor, eps_neg: torch.Tensor, w: float) -> torch.Tensor:
    """Equation 3: eps = (1 + w) eps(x_t, t, c_pos) - w eps(x_t, t, c_neg).

    Args:
        eps_pos, eps_neg: predictions of the noise for the identity's own and for its negative context, [B, C, H, W].
        w: guidance scale; 0 is off here (the IDiff-Face baseline).
    """
    return (1 + w) * eps_pos - w * eps_neg


def schedule(name: str, w: float, T: int, interval: tuple[int, int] = (0, 999)) -> Callable[[int], float]:
    """w(t) for timesteps t = 0 (image) .. T - 1 (noise).

    Args:
        name: `constant` (NegFaceDiff), `linear` (AdaptDiff, arXiv 2603.29569: grows towards the image), `reverse`, or
            `interval` (w within, 0 outside; Kynkaanniemi et al. 2024, arXiv 2404.07724).
        w: guidance scale.
        interval: lowest and highest guided timestep, both included.
    Raises:
        ValueError: an unknown name.
    """
    if name == "constant":
        return lambda t: w
    if name == "linear":
        return lambda t: w * (1 - t / T)
    if name == "reverse":
        return lambda t: w * t / T
    if name == "interval":
        lowest, highest = interval
        return lambda t: w if lowest <= t <= highest else 0.0
    raise ValueError(f"unknown guidance schedule '{name}'; the choices are {', '.join(SCHEDULES)}")


def negative_guided(eps_model: Callable[..., torch.Tensor],
                    eps_model_both: Callable[..., tuple[torch.Tensor, torch.Tensor]],
                    w: Callable[[int], float]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The guided denoiser of equation 3; where w(t) = 0 the negative pass is not run.

    Args:
        eps_model: (x_t, t) -> eps(x_t, t, c_pos).
        eps_model_both: (x_t, t) -> (eps(x_t, t, c_pos), eps(x_t, t, c_neg)), both passes in one call.
        w: the schedule w(t).
    Returns:
        denoise(x_t, t) -> eps [B, C, H, W].
    """
    def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
        if w(t) == 0:
            return eps_model(x_t, t)
        eps_pos, eps_neg = eps_model_both(x_t, t)
        return combine(eps_pos, eps_neg, w(t))

    return denoise
