"""The loss of IDiff-Face (arXiv 2308.04995): DDPM's (arXiv 2006.11239, equation 14), given an identity context.

Dropout on the projected context (CPD) is in the network, models/unet.py. What the miniature adds is in extras.py.
"""
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def diffusion_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], x_0: Tensor, noise: Tensor, t: Tensor,
                   contexts: Tensor, alpha_bars: Tensor,
                   target: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """E || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t, c) ||^2, a scalar.

    Args:
        network: (x_t [B, C, h, w], t [B], contexts [B, D]) -> prediction [B, C, h, w].
        x_0, noise: [B, C, h, w], latents and standard normal values.
        t: [B] int64, 0 .. T - 1.
        alpha_bars: [T].
        target: (x_0, noise, alpha_bar [B, 1, 1, 1]) -> what the network is to predict; by default the noise.
    """
    alpha_bar = alpha_bars[t][:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    return F.mse_loss(network(x_t, t, contexts), noise if target is None else target(x_0, noise, alpha_bar))
