import pytest
import torch

from models.unet import ConditionalUNet
from utils.diffusion import solvers as sampler
from utils.diffusion.latent_diffusion import draw, to_uint8


class Velocity(torch.nn.Module):
    """The network that draws what `unet` draws, told as v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""

    def __init__(self, unet: ConditionalUNet, alpha_bars: torch.Tensor) -> None:
        super().__init__()
        self.unet, self.alpha_bars = unet, alpha_bars
        self.image_proj, self.context_tokens = unet.image_proj, unet.context_tokens

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        alpha_bar = self.alpha_bars[t[0]]
        eps = self.unet(x_t, t, tokens)
        x_t = x_t.repeat(len(eps) // len(x_t), 1, 1, 1)  # both guidance passes see the same x_t
        x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("w", [0, 0.7])
def test_v_draws_what_eps_draws(solver, w):
    torch.manual_seed(0)
    unet = ConditionalUNet(4, 32, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1).eval()
    for weight in unet.parameters():  # some are zero before training, and eps with them
        weight.data += 0.02 * torch.randn_like(weight)
    unet = unet.double()
    betas = sampler.linear_betas()
    velocity = Velocity(unet, torch.cumprod(1 - betas.double(), dim=0))
    c_pos, c_neg = torch.nn.functional.normalize(torch.randn(2, 3, 16), dim=-1)
    noises = {t: torch.randn(3, 4, 8, 8) for t in range(len(betas) + 1)}
    drawn = [draw(network, c_pos, c_neg, lambda t: w, noises.get, solver, 12, betas, prediction=prediction)
             for network, prediction in ((unet, "eps"), (velocity, "v"))]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5 * drawn[0].std().item())


def test_grey_levels():
    images = torch.tensor([-3.0, -1.0, 0.0, 0.9961, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
