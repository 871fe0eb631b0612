"""The solvers: DDPM, DDIM and DPM-Solver++(2M), from x_T to x_0.

They know nothing of files, contexts or ranks: they take `denoise(x_t, t) -> eps`, the noise and the schedule of betas.
"""
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DPMSolverMultistepScheduler

from models.schedule import alpha_bars, linear_betas
from utils.runtime.errors import UserError

Denoise = Callable[[torch.Tensor, int], torch.Tensor]
Noise = Callable[[int], torch.Tensor]


def timesteps(T: int, steps: int) -> list[int]:
    """`steps` timesteps spread evenly over 0 .. T - 1, from noise to image; 200 of 1000 are 995, 990, ..., 0."""
    return [i * T // steps for i in reversed(range(steps))]


def published_timesteps(T: int, steps: int) -> list[int]:
    """The published DDIM's timesteps: every (T // steps)-th, so 150 asked of 1000 are 167 run."""
    return list(reversed(range(0, T, T // steps)))


def ddpm(denoise: Denoise, x_t: torch.Tensor, steps: int, noise: Noise, betas: torch.Tensor,
         as_published: bool = False) -> torch.Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), sigma_t^2 = beta_t, x_0 not clipped.

    With fewer than T steps, alpha_t is the ratio of alpha_bar at neighbouring timesteps. The published code draws no
    noise at t = 1 either (there sigma is about 0.011).
    """
    if as_published and steps != len(betas):
        raise ValueError(f"the published DDPM runs all {len(betas)} steps, not {steps}")
    for t, alpha_bar, alpha_bar_next in _levels(betas, timesteps(len(betas), steps)):
        alpha = alpha_bar / alpha_bar_next
        x_t = (x_t - (1 - alpha) / (1 - alpha_bar) ** 0.5 * denoise(x_t, t)) / alpha**0.5
        if t > (1 if as_published else 0):
            x_t = x_t + (1 - alpha) ** 0.5 * noise(t)
    return x_t


def ddim(denoise: Denoise, x_t: torch.Tensor, steps: int, noise: Noise, betas: torch.Tensor,
         as_published: bool = False) -> torch.Tensor:
    """Deterministic sampling (arXiv 2010.02502, equation 12, eta = 0), x_0 not clipped.

    The published code steps to alpha_bar one timestep beyond the next one, i.e. to t - skip - 1, and runs
    `published_timesteps`.
    """
    T = len(betas)
    levels = _levels(betas, published_timesteps(T, steps), beyond=1) if as_published else \
        _levels(betas, timesteps(T, steps))
    for t, alpha_bar, alpha_bar_next in levels:
        eps = denoise(x_t, t)
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        x_t = alpha_bar_next**0.5 * x_0 + (1 - alpha_bar_next) ** 0.5 * eps
    return x_t


def dpm_solver(denoise: Denoise, x_t: torch.Tensor, steps: int, noise: Noise, betas: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095), by diffusers; recommended from 15 steps."""
    scheduler = DPMSolverMultistepScheduler(len(betas), trained_betas=betas.cpu().numpy(),
                                            solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps, device="cpu")
    for t in scheduler.timesteps:
        x_t = scheduler.step(denoise(x_t, int(t)), t, x_t).prev_sample
    return x_t


# Each (denoise, x_T [B, C, H, W], steps, noise, betas [T]) -> x_0; see `sample`.
SOLVERS: dict[str, Callable[..., torch.Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
PUBLISHED = {"ddpm": partial(ddpm, as_published=True), "ddim": partial(ddim, as_published=True)}


@torch.no_grad()
def sample(denoise: Denoise, x_T: torch.Tensor, solver: str, steps: int, noise: Noise, as_published: bool = False,
           betas: torch.Tensor | None = None) -> torch.Tensor:
    """Draw x_0 from x_T.

    Args:
        denoise: (x_t [B, C, H, W], t) -> eps of the same shape, for timesteps T - 1 >= t >= 0.
        x_T: the prior, standard normal, [B, C, H, W].
        solver: a name in SOLVERS.
        steps: denoising steps, 1 .. T.
        noise: t -> z like x_T; called once at each timestep at which the solver draws noise, in order.
        as_published: ddpm and ddim with the quirks of the published code (see each).
        betas: the schedule, [T]; by default the linear one with T = 1000.
    Returns:
        x_0, float32, [B, C, H, W].
    Raises:
        ValueError: an unknown solver, steps outside 1 .. T, or as_published for what was not published.
    """
    betas = linear_betas() if betas is None else betas
    if not 1 <= steps <= len(betas):
        raise ValueError(f"steps must lie in 1 .. T = {len(betas)}, not {steps}")
    known = PUBLISHED if as_published else SOLVERS
    if solver not in known:
        raise ValueError(f"solver {solver!r}{' as published' * as_published} is unknown; there are {', '.join(known)}")
    return known[solver](denoise, x_T, steps, noise, betas)


def check(solver: str, steps: int, as_published: bool, T: int) -> None:
    """Refuse what a solver cannot run, by running it once on next to nothing.

    Raises:
        UserError: the published code has no such solver, or the solver does not run in that many steps of T.
    """
    if as_published and solver not in PUBLISHED:
        raise UserError(f"sampling.as_published: true is impossible with sampling.solver={solver}, which the published code "
                        f"does not have; set sampling.as_published=false, or sampling.solver to {' or '.join(PUBLISHED)}")
    x_T = torch.ones(1, 1, 1, 1)
    try:
        x_0 = sample(lambda x_t, t: x_t / 2, x_T, solver, steps, lambda t: x_T, as_published, linear_betas(T))
        fault = None if x_0.isfinite().all() else "its steps are too close to one another"
    except (ValueError, IndexError, ZeroDivisionError) as error:
        fault = str(error)
    if fault:
        fewer = "" if as_published and solver == "ddpm" else f"; set fewer, at most {T - 1}"
        every = f"; set sampling.steps={T}, or sampling.as_published=false" if not fewer else ""
        raise UserError(f"sampling.steps: {solver} does not run in {steps} steps of T = {T}: {fault}{fewer}{every}")


def _levels(betas: torch.Tensor, run: list[int], beyond: int = 0) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar at t, alpha_bar stepped to) for each timestep of `run`; alpha_bar is 1 below timestep 0.

    Plain float64 numbers: the loop then neither waits for the device nor rounds the schedule.
    """
    levels = alpha_bars(betas)
    for t, t_next in zip(run, [*run[1:], -1], strict=True):
        t_next = t_next - beyond
        yield t, levels[t], levels[t_next] if t_next >= 0 else 1.0
