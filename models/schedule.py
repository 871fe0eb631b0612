"""The noise schedule of the published models: linear betas (DDPM, arXiv 2006.11239)."""
import torch
from torch import Tensor


def linear_betas(T: int = 1000) -> Tensor:
    """The linear schedule 1e-4 .. 0.02, scaled to T steps: [T] float32."""
    return torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T)


def alpha_bars(betas: Tensor) -> list[float]:
    """The cumulative products of 1 - beta, as plain float64 numbers: they neither wait for a device nor round."""
    return torch.cumprod(1 - betas.double().cpu(), dim=0).tolist()


def schedule_tables(betas: Tensor) -> dict[str, Tensor]:
    """The tables that a published checkpoint holds beside the network, each [T] float32."""
    beta = betas.double()
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    tables = {
        "betas": beta,
        "alphas": alpha,
        "sigmas": beta.sqrt(),
        "sqrt_alphas_inv": 1 / alpha.sqrt(),
        "alpha_bars": alpha_bar,
        "sqrt_alpha_bars": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bars": (1 - alpha_bar).sqrt(),
        "one_minus_alphas_over_sqrt_one_minus_alpha_bars": beta / (1 - alpha_bar).sqrt(),
    }
    return {name: table.float() for name, table in tables.items()}
