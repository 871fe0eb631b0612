"""Guidance rules, equation 3 of NegFaceDiff (arXiv 2508.09661) first, and the schedules w(t).

A rule is (model, x_t, t, c_pos, c_neg, w, state) -> eps [B, C, H, W]. `model.eps(x_t, t, c)` is one pass of the network,
`model.eps_pair(x_t, t, c_pos, c_neg)` both in one batch, `model.alpha_bar(t)` a float; w is a float or [B, 1, 1, 1];
`state` is a dict, empty at x_T, for what a rule remembers of each image.
"""
from collections.abc import Callable
from functools import partial

from torch import Tensor

APG_ETA, APG_MOMENTUM, APG_RMS = 0.0, -0.5, 0.05  # the norm's limit as rms of a latent's values; not tuned yet


def negative(model, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor, w: float | Tensor, state: dict) -> Tensor:
    """NegFaceDiff (arXiv 2508.09661, equation 3)."""
    eps_pos, eps_neg = model.eps_pair(x_t, t, c_pos, c_neg)
    return (1 + w) * eps_pos - w * eps_neg


def apg(model, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor, w: float | Tensor, state: dict) -> Tensor:
    """Adaptive projected guidance (arXiv 2410.02416): in x_0, less of the difference along x_0, with a limit."""
    alpha_bar = model.alpha_bar(t)
    eps_pos, eps_neg = model.eps_pair(x_t, t, c_pos, c_neg)
    x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps_pos) / alpha_bar**0.5
    difference = ((1 - alpha_bar) / alpha_bar) ** 0.5 * (eps_neg - eps_pos)
    state["difference"] = difference = difference + APG_MOMENTUM * state.get("difference", 0.0)
    rms = difference.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    difference = difference * (APG_RMS / rms.clamp(min=APG_RMS))
    along = (difference * x_0).sum(dim=(1, 2, 3), keepdim=True) / x_0.square().sum(dim=(1, 2, 3), keepdim=True) * x_0
    x_0 = x_0 + w * (difference - along + APG_ETA * along)
    return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5


def reused(model, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor, w: float | Tensor, state: dict, every: int) -> Tensor:
    """Equation 3 as eps_pos + w (eps_pos - eps_neg), the difference being that of each `every`-th step."""
    state["step"] = state.get("step", -1) + 1
    if state["step"] % every:
        return model.eps(x_t, t, c_pos) + w * state["difference"]
    eps_pos, eps_neg = model.eps_pair(x_t, t, c_pos, c_neg)
    state["difference"] = eps_pos - eps_neg
    return eps_pos + w * state["difference"]


RULES: dict[str, Callable[..., Tensor]] = {"negative": negative, "apg": apg, "every2": partial(reused, every=2),
                                           "every3": partial(reused, every=3)}

# (w, t, T, interval) -> w(t), for timesteps t = 0 (image) .. T - 1 (noise).
SCHEDULES: dict[str, Callable[[float, int, int, tuple[int, int]], float]] = {
    "constant": lambda w, t, T, interval: w,  # NegFaceDiff
    "linear": lambda w, t, T, interval: w * (1 - t / T),  # AdaptDiff (arXiv 2603.29569): grows towards the image
    "reverse": lambda w, t, T, interval: w * t / T,
    "interval": lambda w, t, T, interval: w if interval[0] <= t <= interval[1] else 0.0,  # arXiv 2404.07724
}

# (w, u) -> the w of each image, for u uniform between 0 and 1, [B, 1, 1, 1], from each image's own stream.
W_PER_IMAGE: dict[str, Callable[[float, Tensor], float | Tensor]] = {
    "constant": lambda w, u: w,
    "uniform": lambda w, u: w * u,
    "mixture": lambda w, u: w * (u < 0.5),
}


def guided(rule: str, w: float | Tensor, schedule: str = "constant", interval: tuple[int, int] = (0, 999),
           change: Callable[[Tensor, int], Tensor] | None = None) -> Callable:
    """The guided prediction by a rule and a schedule; where w(t) = 0 for all, the negative pass is not run.

    Args:
        rule, schedule: names in RULES and SCHEDULES.
        w: guidance scale; 0 is off: the IDiff-Face baseline. Or one for each image, [B, 1, 1, 1] on the device, not all 0.
        interval: lowest and highest guided timestep of the schedule `interval`, both included.
        change: (c_pos, t) -> the contexts of timestep t, before the rule sees them: utils.diffusion.annealing.
    Returns:
        (model, c_pos, c_neg) -> denoise(x_t, t) -> eps [B, C, H, W].
    """
    def start(model, c_pos: Tensor, c_neg: Tensor | None) -> Callable[[Tensor, int], Tensor]:
        state = {}

        def denoise(x_t: Tensor, t: int) -> Tensor:
            c = c_pos if change is None else change(c_pos, t)
            scale = 1.0 if isinstance(w, Tensor) else w  # a tensor would have to be waited for
            if SCHEDULES[schedule](scale, t, model.T, interval) == 0:
                return model.eps(x_t, t, c)
            return RULES[rule](model, x_t, t, c, c_neg, SCHEDULES[schedule](w, t, model.T, interval), state)

        return denoise

    return start


unguided = guided("negative", 0.0)  # IDiff-Face
