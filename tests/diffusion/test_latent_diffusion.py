"""utils/diffusion/latent_diffusion.py: what the one object hides, and that it hides it well."""
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from models.schedule import linear_betas
from models.unet import ConditionalUNet
from utils.diffusion.guidance import guided, unguided
from utils.diffusion.latent_diffusion import CACHED_TOKENS, LatentDiffusion, eps_of_v, to_uint8

BETAS = linear_betas()
CPU = torch.device("cpu")


class Velocity(nn.Module):
    """The network that draws what `unet` draws, told as v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""

    def __init__(self, unet: ConditionalUNet, alpha_bars: Tensor) -> None:
        super().__init__()
        self.unet, self.alpha_bars = unet, alpha_bars
        self.context_tokens = unet.context_tokens

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        alpha_bar = self.alpha_bars[t[0]]
        eps = self.unet(x_t, t, tokens)
        x_t = x_t.repeat(len(eps) // len(x_t), 1, 1, 1)  # both guidance passes see the same x_t
        x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0


class Tenfold(nn.Module):
    """A first stage whose images are ten times its latents."""

    def decode(self, latents: Tensor) -> Tensor:
        return 10 * latents


@pytest.fixture(scope="module")
def unet() -> ConditionalUNet:
    torch.manual_seed(0)
    unet = ConditionalUNet(4, 32, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1).eval()
    for weight in unet.parameters():  # some are zero before training, and eps with them
        weight.data += 0.02 * torch.randn_like(weight)
    return unet.requires_grad_(False)


@pytest.fixture
def model(unet) -> LatentDiffusion:
    return LatentDiffusion(unet, Tenfold(), BETAS, (4, 8, 8), "eps", CPU, bf16=False)


def contexts(*seeds: int, batch: int = 3) -> list[Tensor]:
    return [nn.functional.normalize(torch.randn(batch, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)
            for seed in seeds]


def noise(t: int) -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(t))


def counted(monkeypatch, unet: ConditionalUNet) -> list[int]:
    """The batch size of each call of `context_tokens`, in order."""
    batches, original = [], unet.context_tokens
    monkeypatch.setattr(unet, "context_tokens", lambda contexts: batches.append(len(contexts)) or original(contexts))
    return batches


# ---- eps -------------------------------------------------------------------------------------------------------------

def test_eps_is_the_networks(model, unet):
    (c_pos, c_neg), x_t = contexts(1, 2), noise(0)
    t = torch.full((3,), 700)
    assert (model.eps(x_t, 700, c_pos) - unet(x_t, t, c_pos)).abs().max() < 1e-6
    for eps, context in zip(model.eps_pair(x_t, 700, c_pos, c_neg), (c_pos, c_neg), strict=True):
        assert eps.shape == x_t.shape and (eps - unet(x_t, t, context)).abs().max() < 1e-5


def test_alpha_bar_is_the_product_up_to_t(model):
    assert model.T == 1000
    assert model.alpha_bar(0) == pytest.approx(1 - 1e-4, abs=1e-9)
    assert model.alpha_bar(2) == pytest.approx((1 - BETAS[:3].double()).prod().item(), abs=1e-15)
    assert model.alpha_bar(999) == pytest.approx(4.0358e-5, rel=1e-4)  # DDPM's own: 4e-5


def test_eps_of_v_by_hand():
    eps, x_0, alpha_bar = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0]), 0.36
    v, x_t = 0.6 * eps - 0.8 * x_0, 0.6 * x_0 + 0.8 * eps
    assert eps_of_v(v, x_t, alpha_bar).tolist() == pytest.approx([2.0, -1.0], abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("w", [0, 0.7])
def test_v_draws_what_eps_draws(unet, solver, w):
    c_pos, c_neg = contexts(1, 2)
    drawn = []
    unet = deepcopy(unet)
    for network, prediction in ((unet, "eps"), (Velocity(unet, torch.cumprod(1 - BETAS.double(), dim=0)), "v")):
        model = LatentDiffusion(network, Tenfold(), BETAS, (4, 8, 8), prediction, CPU, bf16=False)
        model.dtype = torch.float64  # as the network, so that the comparison is not one of float32's rounding
        network.double()
        drawn.append(model.latents(c_pos, c_neg, noise, guided("negative", w), solver, 12))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5 * drawn[0].std().item())


# ---- the tokens of the contexts --------------------------------------------------------------------------------------

def test_tokens_are_computed_once_for_the_same_contexts(model, unet, monkeypatch):
    batches, (c_pos, c_neg) = counted(monkeypatch, unet), contexts(1, 2)
    guide = guided("negative", 0.5)
    first = model.latents(c_pos, c_neg, noise, guide, "ddim", 12)
    assert batches == [6]  # both at once, for twelve steps
    assert torch.equal(model.latents(c_pos, c_neg, noise, guide, "ddim", 12), first)
    assert batches == [6]
    model.latents(c_pos, c_neg.clone(), noise, guide, "ddim", 2)
    assert batches == [6, 6]  # equal values in another tensor count as other contexts
    model.latents(c_pos, c_neg, noise, unguided, "ddim", 2)
    assert batches == [6, 6, 3]


def test_a_schedule_that_goes_on_and_off_needs_them_twice(model, unet, monkeypatch):
    batches, (c_pos, c_neg) = counted(monkeypatch, unet), contexts(1, 2)
    model.latents(c_pos, c_neg, noise, guided("negative", 0.5, "interval", (300, 700)), "ddim", 20)
    assert sorted(batches) == [3, 6]


def test_new_contexts_never_get_the_tokens_of_freed_ones(model, unet):
    x_t, t = noise(0), torch.full((3,), 5)
    for seed in range(4 * CACHED_TOKENS):
        [context] = contexts(seed)  # the one before may be freed, and its address given to this one
        assert (model.eps(x_t, 5, context) - unet(x_t, t, context)).abs().max() < 1e-6
        assert len(model.tokens) <= CACHED_TOKENS


def test_contexts_may_change_along_t(model, unet):
    """Annealed contexts, say: new ones at each step."""
    (c_pos, c_neg), x_t, t = contexts(1, 2), noise(0), torch.full((3,), 5)
    for step in range(2 * CACHED_TOKENS):
        annealed = c_pos + 0.1 * step
        eps, _ = model.eps_pair(x_t, 5, annealed, c_neg)
        assert (eps - unet(x_t, t, annealed)).abs().max() < 1e-5


# ---- images ----------------------------------------------------------------------------------------------------------

def test_images_are_the_decoded_latents_clipped(model):
    c_pos, c_neg = contexts(1, 2)
    guide = guided("negative", 0.5)
    latents = model.latents(c_pos, c_neg, noise, guide, "ddim", 5)
    images = model.images(c_pos, c_neg, noise, guide, "ddim", 5)
    assert torch.equal(images, (10 * latents).clamp(-1, 1)) and images.abs().max() == 1


def test_published_solvers_are_passed_on(model):
    c_pos, c_neg = contexts(1, 2)
    as_published, textbook = (model.latents(c_pos, c_neg, noise, guided("negative", 0.5), "ddim", 10, as_published)
                              for as_published in (True, False))
    assert (as_published - textbook).abs().max() > 1e-4  # its alpha_bar is one timestep off


def test_bf16_rounds_the_network_alone(unet):
    twin = ConditionalUNet(4, 32, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1).eval()
    twin.load_state_dict(unet.state_dict())
    rounded = LatentDiffusion(twin, Tenfold(), BETAS, (4, 8, 8), "eps", CPU, bf16=True)
    exact = LatentDiffusion(unet, Tenfold(), BETAS, (4, 8, 8), "eps", CPU, bf16=False)
    assert {weight.dtype for weight in twin.parameters()} == {torch.bfloat16}
    c_pos, c_neg = contexts(1, 2)
    first, second = (model.latents(c_pos, c_neg, noise, guided("negative", 0.5), "ddim", 5) for model in (rounded, exact))
    assert first.dtype == torch.float32 and not torch.equal(first, first.bfloat16().float())
    assert 0 < (first - second).abs().mean() < 0.05 * second.std()


def test_grey_levels():
    images = torch.tensor([-3.0, -1.0, 0.0, 0.9961, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
