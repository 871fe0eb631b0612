"""Which of the T timesteps a solver runs in, from noise to image.

A spacing is (steps, alpha_bars [T]) -> timesteps, whole numbers that fall. They are those of diffusers; a solver
always takes the noise level of the timestep itself, where diffusers keeps Karras' unrounded ones.
"""
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from models.schedule import alpha_bars
from utils.diffusion.fitted import FITTED

KARRAS_RHO = 7.0
EVEN = ("ddpm", "ddim")  # the solvers whose own spacing is `leading`; that of the others is `linspace`


def leading(steps: int, alpha_bars: Sequence[float]) -> list[int]:
    """Spread evenly over 0 .. T - 1, the last one 0; 200 of 1000 are 995, 990, ..., 0."""
    return [i * len(alpha_bars) // steps for i in reversed(range(steps))]


def linspace(steps: int, alpha_bars: Sequence[float]) -> list[int]:
    """From T - 1 in equal parts of the way to 0, which is not run."""
    return np.linspace(0, len(alpha_bars) - 1, steps + 1).round().astype(int)[:0:-1].tolist()


def trailing(steps: int, alpha_bars: Sequence[float]) -> list[int]:
    """From T - 1 in steps of T / steps (arXiv 2305.08891)."""
    return ((len(alpha_bars) * np.arange(steps, 0, -1) / steps).round().astype(int) - 1).tolist()


def karras(steps: int, alpha_bars: Sequence[float]) -> list[int]:
    """sigma^(1/7) in equal steps (arXiv 2206.00364, equation 5), sigma^2 = (1 - alpha_bar) / alpha_bar."""
    sigmas = np.exp(_log_sigmas(alpha_bars)) ** (1 / KARRAS_RHO)
    return _nearest(KARRAS_RHO * np.log(np.linspace(sigmas[-1], sigmas[0], steps)), alpha_bars)


def log_snr(steps: int, alpha_bars: Sequence[float]) -> list[int]:
    """log(alpha_bar / (1 - alpha_bar)) in equal steps (arXiv 2206.00927)."""
    log_sigmas = _log_sigmas(alpha_bars)
    return _nearest(np.linspace(log_sigmas[-1], log_sigmas[0], steps), alpha_bars)


SPACINGS: dict[str, Callable[[int, Sequence[float]], list[int]]] = {
    "leading": leading, "linspace": linspace, "trailing": trailing, "karras": karras, "log_snr": log_snr}


def timesteps(spacing: str, solver: str, steps: int, betas: Tensor) -> list[int]:
    """The timesteps of a solver, `steps` of them, falling.

    Args:
        spacing: a name in SPACINGS, or `default`: the solver's own, `leading` or `linspace`, or what was fitted.
        betas: the schedule, [T].
    Raises:
        ValueError: steps outside 1 .. T, or none of those that were fitted.
    """
    if not 1 <= steps <= len(betas):
        raise ValueError(f"steps must lie in 1 .. T = {len(betas)}, not {steps}")
    if spacing == "default" and solver == "fitted":
        if steps not in FITTED:
            raise ValueError(f"it was fitted for {', '.join(map(str, FITTED))} steps")
        return [int(t) for t, *_ in FITTED[steps]]
    if spacing == "default":
        spacing = "leading" if solver in EVEN else "linspace"
    return SPACINGS[spacing](steps, alpha_bars(betas))


def published_ddim(T: int, steps: int) -> list[int]:
    """The published DDIM's timesteps: every (T // steps)-th, so 150 asked of 1000 are 167 run."""
    return list(reversed(range(0, T, T // steps)))


def _log_sigmas(alpha_bars: Sequence[float]) -> np.ndarray:
    levels = np.array(alpha_bars)
    return np.log((1 - levels) / levels) / 2


def _nearest(log_sigmas: np.ndarray, alpha_bars: Sequence[float]) -> list[int]:
    """The timesteps of these noise levels, falling; no timestep twice, which many steps near t = 0 would round to."""
    T, number = len(alpha_bars), np.arange(len(log_sigmas))
    rising = np.interp(log_sigmas[::-1], _log_sigmas(alpha_bars), np.arange(T)).round().astype(int)
    rising = np.maximum.accumulate(rising - number) + number
    return np.minimum(rising, T - len(number) + number)[::-1].tolist()
