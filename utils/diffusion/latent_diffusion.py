"""The trained generator: from contexts and noise to images."""
from collections.abc import Callable

import torch

from models.unet import ConditionalUNet
from utils.diffusion import guidance
from utils.diffusion import solvers as sampler


def draw(unet: ConditionalUNet, c_pos: torch.Tensor, c_neg: torch.Tensor | None, w: Callable[[int], float],
         noise: Callable[[int], torch.Tensor], solver: str, steps: int, betas: torch.Tensor,
         as_published: bool = False, prediction: str = "eps") -> torch.Tensor:
    """The latents x_0 [B, C, h, w] of contexts c_pos [B, D] with the negatives c_neg [B, D] (None: without).

    `noise(t)` is the noise of timestep t and, at t = T, the prior x_T. Both guidance passes run as one batch. A network
    that predicts v rather than eps (`prediction`) is read as eps: equation 3 is the same in both.
    """
    batch = len(c_pos)
    t_of = torch.arange(len(betas), device=c_pos.device)[:, None].expand(-1, batch)  # on the device before it is needed
    dtype = unet.image_proj.weight.dtype  # the network may compute in bfloat16; x_t and equation 3 stay float32
    tokens = unet.context_tokens((c_pos if c_neg is None else torch.cat([c_pos, c_neg])).to(dtype))
    alpha_bars = torch.cumprod(1 - betas.double().cpu(), dim=0).tolist()

    def eps(x_t: torch.Tensor, t: int, tokens: torch.Tensor) -> torch.Tensor:
        predicted = unet(x_t.to(dtype), t_of[t], tokens).float()
        if prediction == "eps":
            return predicted
        return eps_of_v(predicted, x_t.repeat(len(predicted) // batch, 1, 1, 1), alpha_bars[t])

    denoise = guidance.negative_guided(lambda x_t, t: eps(x_t, t, tokens[:batch]),
                                       lambda x_t, t: eps(x_t, t, tokens).chunk(2),
                                       w if c_neg is not None else lambda t: 0)
    return sampler.sample(denoise, noise(len(betas)), solver, steps, noise, as_published, betas)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1], clipped, to uint8 [B, H, W, 3], 0 .. 255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def eps_of_v(v: torch.Tensor, x_t: torch.Tensor, alpha_bar: float | torch.Tensor) -> torch.Tensor:
    """eps from v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, appendix D)."""
    return alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x_t
