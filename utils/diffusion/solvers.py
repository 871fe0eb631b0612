"""The solvers: DDPM, DDIM, DPM-Solver++(2M) and its SDE variant, UniPC, DEIS and a fitted one, from x_T to x_0.

They know nothing of files, contexts or ranks: they take `denoise(x_t, t) -> eps`, the timesteps that they run in, the noise
and the schedule of betas. Below, rho = sqrt(1 - alpha_bar) / sqrt(alpha_bar) and lambda = -log rho. The last step gives the
x_0 that is predicted there.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from models.schedule import alpha_bars, linear_betas
from utils.diffusion import spacings
from utils.diffusion.fitted import FITTED
from utils.runtime.errors import UserError

FITTED_T = 1000
Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]


def ddpm(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor,
         as_published: bool = False) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), sigma_t^2 = beta_t, x_0 not clipped.

    With fewer than T steps, alpha_t is the ratio of alpha_bar at neighbouring timesteps. The last step draws no noise, at
    whatever t it is; in the published code neither does that at t = 1 (there sigma is about 0.011).
    """
    if as_published and len(timesteps) != len(betas):
        raise ValueError(f"the published DDPM runs all {len(betas)} steps, not {len(timesteps)}")
    for t, alpha_bar, alpha_bar_next in _levels(betas, timesteps):
        alpha = alpha_bar / alpha_bar_next
        x_t = (x_t - (1 - alpha) / (1 - alpha_bar) ** 0.5 * denoise(x_t, t)) / alpha**0.5
        if alpha_bar_next < 1 and not (as_published and t == 1):
            x_t = x_t + (1 - alpha) ** 0.5 * noise(t)
    return x_t


def ddim(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor,
         as_published: bool = False) -> Tensor:
    """Deterministic sampling (arXiv 2010.02502, equation 12, eta = 0), x_0 not clipped.

    The published code steps to alpha_bar one timestep beyond the next one, i.e. to t - skip - 1, and runs every
    (T // steps)-th timestep.
    """
    if as_published:
        timesteps = spacings.published_ddim(len(betas), len(timesteps))
    for t, alpha_bar, alpha_bar_next in _levels(betas, timesteps, beyond=int(as_published)):
        eps = denoise(x_t, t)
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        x_t = alpha_bar_next**0.5 * x_0 + (1 - alpha_bar_next) ** 0.5 * eps
    return x_t


def dpm_solver(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), by diffusers; recommended from 15 steps."""
    scheduler = DPMSolverMultistepScheduler(len(betas), trained_betas=betas.cpu().numpy(),
                                            solver_order=2, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(timesteps=list(timesteps), device="cpu")
    for t in scheduler.timesteps:
        x_t = scheduler.step(denoise(x_t, int(t)), t, x_t).prev_sample
    return x_t


def sde_dpm_solver(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix): DPM-Solver++ of the diffusion SDE, with noise at every step."""
    earlier, h_earlier = None, math.inf
    for t, alpha_bar, alpha_bar_next in _levels(betas, timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = _alpha_sigma(alpha_bar), _alpha_sigma(alpha_bar_next)
        x_0 = (x_t - sigma * denoise(x_t, t)) / alpha
        if sigma_next == 0:
            return x_0
        h = math.log(sigma / alpha) - math.log(sigma_next / alpha_next)
        D = x_0 if earlier is None else x_0 + h / (2 * h_earlier) * (x_0 - earlier)
        x_t = (sigma_next / sigma * math.exp(-h) * x_t - alpha_next * math.expm1(-2 * h) * D
               + sigma_next * (-math.expm1(-2 * h)) ** 0.5 * noise(t))
        earlier, h_earlier = x_0, h
    return x_t


def unipc(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor, order: int = 2) -> Tensor:
    """UniPC (arXiv 2302.04867) with B(h) = e^h - 1: each prediction also corrects x_t where it is made.

    The first and last steps are of lower orders, for want of predictions before and room behind.
    """
    run = list(_levels(betas, timesteps))
    x, seen, p = x_t, [], 1  # x_t corrected, (lambda, x_0) of each timestep, the order of the last step
    for i, (t, alpha_bar, alpha_bar_next) in enumerate(run):
        alpha, sigma = _alpha_sigma(alpha_bar)
        x_0 = (x_t - sigma * denoise(x_t, t)) / alpha
        if i == len(run) - 1:
            return x_0
        now = (math.log(alpha / sigma), x_0)
        if i > 0:
            x = _unipc_step(x, [seen[-1], *seen[-p:-1], now], run[i - 1][1], alpha_bar)
        seen.append(now)
        p = min(order, i + 1, len(run) - i)
        x_t = _unipc_step(x, [seen[-1], *seen[-p:-1]], alpha_bar, alpha_bar_next)
    return x_t


def _unipc_step(x: Tensor, seen: list[tuple[float, Tensor]], alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """x a step further by the predictions (lambda, x_0) `seen`, that of the step's beginning first."""
    sigma, (alpha_next, sigma_next) = _alpha_sigma(alpha_bar)[1], _alpha_sigma(alpha_bar_next)
    (lambda_0, x_0), *others = seen
    h = math.log(alpha_next / sigma_next) - lambda_0
    r, B = [(other - lambda_0) / h for other, _ in others], math.expm1(-h)
    phi, b = -B / h - 1, []
    for k in range(1, len(r) + 1):
        b.append(phi * math.factorial(k) / B)
        phi = phi / -h - 1 / math.factorial(k + 1)
    # the equations' own choice where there is one unknown: it is not solved for
    rho = [0.5] if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, b).tolist()
    D = x_0
    for rho_k, r_k, (_, other) in zip(rho, r, others, strict=True):
        D = D + rho_k / r_k * (other - x_0)
    return sigma_next / sigma * x - alpha_next * B * D


def deis(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor, order: int = 2) -> Tensor:
    """DEIS, log-rho multistep (arXiv 2204.13902, equation 15): d(x / alpha) = eps d rho, eps a polynomial in log rho.

    The first and last steps are of lower orders, as in `unipc`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(32)
    run, seen = list(_levels(betas, timesteps)), []  # (log rho, eps) of each timestep
    for i, (t, alpha_bar, alpha_bar_next) in enumerate(run):
        (alpha, sigma), (alpha_next, sigma_next) = _alpha_sigma(alpha_bar), _alpha_sigma(alpha_bar_next)
        seen.append((math.log(sigma / alpha), denoise(x_t, t)))
        if i == len(run) - 1:
            return (x_t - sigma * seen[-1][1]) / alpha
        start, end = seen[-1][0], math.log(sigma_next / alpha_next)
        u = (start + end) / 2 + (end - start) / 2 * nodes  # where the integral over log rho is read
        x = x_t / alpha
        latest = seen[-min(order, i + 1, len(run) - i) :]
        for u_j, eps in latest:
            basis = math.prod((u - u_m) / (u_j - u_m) for u_m, _ in latest if u_m != u_j)
            x = x + float((end - start) / 2 * (weights * np.exp(u) * basis).sum()) * eps
        x_t = alpha_next * x
    return x_t


def fitted(denoise: Denoise, x_t: Tensor, timesteps: Sequence[int], noise: Noise, betas: Tensor,
           numbers: Sequence[Sequence[float]] | None = None) -> Tensor:
    """A step is a weighted sum of x_t and the predictions of x_0 so far (S4S, arXiv 2502.17423), by least squares.

    The weights hold for one network, one schedule of betas and one list of timesteps; by default those of FITTED.
    """
    numbers = FITTED.get(len(timesteps), ()) if numbers is None else numbers
    if [t for t, *_ in numbers] != list(timesteps):
        raise ValueError("it was fitted for its own timesteps")
    seen: list[Tensor] = []  # predictions of x_0, the latest first
    for (t, alpha_bar, _), (_, a, *b) in zip(_levels(betas, timesteps), numbers, strict=True):
        alpha, sigma = _alpha_sigma(alpha_bar)
        seen.insert(0, (x_t - sigma * denoise(x_t, t)) / alpha)
        x_t = a * x_t + sum(b_j * x_0 for b_j, x_0 in zip(b, seen, strict=False))
    return x_t


# Each (denoise, x_T [B, C, H, W], timesteps, noise, betas [T]) -> x_0; see `sample`.
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver, "dpm++sde": sde_dpm_solver, "unipc": unipc,
    "unipc3": partial(unipc, order=3), "deis": deis, "deis3": partial(deis, order=3), "fitted": fitted}
PUBLISHED = {"ddpm": partial(ddpm, as_published=True), "ddim": partial(ddim, as_published=True)}


@torch.no_grad()
def sample(denoise: Denoise, x_T: Tensor, solver: str, steps: int | Sequence[int], noise: Noise, as_published: bool = False,
           betas: Tensor | None = None) -> Tensor:
    """Draw x_0 from x_T.

    Args:
        denoise: (x_t [B, C, H, W], t) -> eps of the same shape, for timesteps T - 1 >= t >= 0.
        x_T: the prior, standard normal, [B, C, H, W].
        solver: a name in SOLVERS.
        steps: denoising steps, 1 .. T, in the solver's own spacing; or the timesteps themselves, falling.
        noise: t -> z like x_T; called once at each timestep at which the solver draws noise, in order.
        as_published: ddpm and ddim with the quirks of the published code (see each).
        betas: the schedule, [T]; by default the linear one with T = 1000.
    Returns:
        x_0, float32, [B, C, H, W].
    Raises:
        ValueError: an unknown solver, steps outside 1 .. T, or as_published for what was not published.
    """
    betas = linear_betas() if betas is None else betas
    known = PUBLISHED if as_published else SOLVERS
    if solver not in known:
        raise ValueError(f"solver {solver!r}{' as published' * as_published} is unknown; there are {', '.join(known)}")
    if isinstance(steps, int):
        steps = spacings.timesteps("default", solver, steps, betas)
    return known[solver](denoise, x_T, steps, noise, betas)


def check(solver: str, steps: int, as_published: bool, T: int, spacing: str = "default") -> None:
    """Refuse what a solver cannot run, by running it once on next to nothing.

    Raises:
        UserError: the published code has no such solver or spacing, or the solver does not run in that many steps of T.
    """
    if as_published and solver not in PUBLISHED:
        raise UserError(f"sampling.as_published: true is impossible with sampling.solver={solver}, which the published code "
                        f"does not have; set sampling.as_published=false, or sampling.solver to {' or '.join(PUBLISHED)}")
    if as_published and spacing != "default":
        raise UserError(f"sampling.spacing: {spacing} is impossible with sampling.as_published=true, which has its own; set "
                        "sampling.spacing=default, or sampling.as_published=false")
    x_T, betas = torch.ones(1, 1, 1, 1), linear_betas(T)
    try:
        run = spacings.timesteps(spacing, solver, steps, betas)
        x_0 = sample(lambda x_t, t: x_t / 2, x_T, solver, run, lambda t: x_T, as_published, betas)
        fault = None if x_0.isfinite().all() else "its steps are too close to one another"
    except (ValueError, IndexError, ZeroDivisionError) as error:
        fault = str(error)
    if solver == "fitted" and (fault or T != FITTED_T):
        raise UserError(f"sampling.solver: fitted was fitted to the embedded weights (T = {FITTED_T}) for "
                        f"{', '.join(map(str, FITTED))} steps in its own spacing, not {steps} of T = {T} in {spacing}; set "
                        "sampling.steps to one of these and sampling.spacing=default, or another solver, such as "
                        "sampling.solver=dpm++")
    if fault:
        fewer = "" if as_published and solver == "ddpm" else f"; set fewer, at most {T - 1}"
        every = f"; set sampling.steps={T}, or sampling.as_published=false" if not fewer else ""
        raise UserError(f"sampling.steps: {solver} does not run in {steps} steps of T = {T}: {fault}{fewer}{every}")


def _levels(betas: Tensor, timesteps: Sequence[int], beyond: int = 0) -> Iterator[tuple[int, float, float]]:
    """(t, alpha_bar at t, alpha_bar stepped to) for each of the timesteps; alpha_bar is 1 below timestep 0.

    Plain float64 numbers: the loop then neither waits for the device nor rounds the schedule.
    """
    levels = alpha_bars(betas)
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        t_next = t_next - beyond
        yield t, levels[t], levels[t_next] if t_next >= 0 else 1.0


def _alpha_sigma(alpha_bar: float) -> tuple[float, float]:
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
