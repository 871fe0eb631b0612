"""The losses against arithmetic written out: IDiff-Face's, v, the miniature's extras, and all of them together."""
import math
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.schedule import alpha_bars, linear_betas
from utils.diffusion.latent_diffusion import eps_of_v
from utils.runtime.ranks import Ranks
from utils.training.diffusion_loss import diffusion_loss
from utils.training.draws import Draws
from utils.training.extras import EXTRAS, JUDGED_STEPS, altered, context_scale, identity_loss, v_target
from utils.training.generator_loss import GeneratorLoss

T = 1000
ALPHA_BARS = torch.tensor(alpha_bars(linear_betas()), dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- IDiff-Face's ----------------------------------------------------------------------------------------------------

def toy(x_t: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """A network that can be written out: of all that it is given."""
    return 0.3 * x_t + (t.double() / T)[:, None, None, None] * contexts.sum(dim=1)[:, None, None, None]


@pytest.mark.parametrize("target", ["eps", "v"])
def test_the_loss_is_the_mean_squared_error_written_out(target):
    x_0, noise, contexts = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1), draw(3, 5, seed=2)
    t = torch.tensor([0, 417, 999])
    loss = diffusion_loss(toy, x_0, noise, t, contexts, ALPHA_BARS, None if target == "eps" else v_target)
    betas, errors = np.linspace(1e-4, 0.02, T), []
    for b in range(3):
        alpha_bar = np.prod(1 - betas[: t[b] + 1])
        for x, e in zip(x_0[b].flatten().tolist(), noise[b].flatten().tolist(), strict=True):
            x_t = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * e
            predicted = 0.3 * x_t + t[b].item() / T * sum(contexts[b].tolist())
            wanted = e if target == "eps" else math.sqrt(alpha_bar) * e - math.sqrt(1 - alpha_bar) * x
            errors.append((predicted - wanted) ** 2)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-6)  # the schedule's betas are float32


def test_a_network_that_knows_the_noise_has_no_loss():
    x_0, noise, contexts, t = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), draw(4, 5), torch.tensor([0, 5, 500, 999])

    def knows(x_t: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        alpha_bar = ALPHA_BARS[t][:, None, None, None]
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

    assert diffusion_loss(knows, x_0, noise, t, contexts, ALPHA_BARS).item() < 1e-20
    assert diffusion_loss(knows, x_0, noise, t, contexts, ALPHA_BARS, v_target).item() > 0.5


def test_v_by_hand_and_back():
    alpha_bar = torch.tensor([0.64, 1.0, 0.0], dtype=torch.float64)[:, None, None, None]
    x_0, noise = torch.full((3, 1, 1, 1), 2.0, dtype=torch.float64), torch.full((3, 1, 1, 1), 5.0, dtype=torch.float64)
    v = v_target(x_0, noise, alpha_bar)
    assert v.flatten().tolist() == pytest.approx([0.8 * 5 - 0.6 * 2, 5, -2], abs=1e-12)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(eps_of_v(v, x_t, alpha_bar), noise, rtol=0, atol=1e-12)


# ---- the extras ------------------------------------------------------------------------------------------------------

B, D = 4000, 16


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, and unit contexts of an image and of another one."""
    x_0, own, other = draw(B, 2, 2, 2).float(), draw(B, D, seed=1).float(), draw(B, D, seed=2).float()
    return x_0, F.normalize(own), F.normalize(other)


def shown(batch: tuple[torch.Tensor, ...], *use: str, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return altered(*batch, use, Draws(7, step, B, Ranks(0, 1, torch.device("cpu"))))


@pytest.mark.parametrize("use", [(), ("v",), ("adamw",), ("v", "adamw")])
def test_without_an_extra_that_alters_them_latents_and_contexts_are_as_they_are(batch, use):
    x_0, contexts = shown(batch, *use)
    assert torch.equal(x_0, batch[0]) and torch.equal(contexts, batch[1])


def test_scaled_contexts_have_numbers_of_about_one(batch):
    x_0, contexts = shown(batch, "scaled_contexts")
    assert torch.equal(x_0, batch[0])
    torch.testing.assert_close(contexts, 4 * batch[1], rtol=0, atol=1e-6)
    assert (context_scale(("scaled_contexts",), D), context_scale(("v", "noise"), D)) == (4.0, 1.0)


def test_a_part_of_the_contexts_is_of_another_image_of_the_same_person(batch):
    x_0, contexts = shown(batch, "same_person")
    assert torch.equal(x_0, batch[0])
    own, other = (contexts == batch[1]).all(dim=1), (contexts == batch[2]).all(dim=1)
    assert (own ^ other).all() and other.float().mean().item() == pytest.approx(EXTRAS["same_person"]["part"], abs=0.03)
    assert torch.equal(shown(batch, "same_person")[1], contexts)
    assert not torch.equal(shown(batch, "same_person", step=1)[1], contexts)


def test_a_part_of_the_contexts_is_null(batch):
    x_0, contexts = shown(batch, "null_contexts")
    assert torch.equal(x_0, batch[0])
    null = (contexts == 0).all(dim=1)
    assert null.float().mean().item() == pytest.approx(EXTRAS["null_contexts"]["part"], abs=0.03)
    assert torch.equal(contexts[~null], batch[1][~null])
    # nothing comes over the zero vector, which is exact whatever else is on
    everything = shown(batch, *EXTRAS)[1]
    assert (everything == 0).all(dim=1).float().mean().item() == pytest.approx(EXTRAS["null_contexts"]["part"], abs=0.03)


@pytest.mark.parametrize("use", [("noise",), ("noise", "scaled_contexts")])
def test_noise_has_its_standard_deviation_and_is_each_images_own(batch, use):
    x_0, contexts = shown(batch, *use)
    scale = context_scale(use, D)
    for difference, expected in ((x_0 - batch[0], EXTRAS["noise"]["latents"]),
                                 ((contexts - scale * batch[1]) / scale * D**0.5, EXTRAS["noise"]["contexts"])):
        assert difference.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(difference.mean().item()) < 0.05 * expected
        assert len(difference.flatten(1)[:, 0].unique()) > 0.99 * B


def test_the_miniature_s_defaults_are_all_extras():
    assert list(EXTRAS) == ["v", "adamw", "scaled_contexts", "noise", "same_person", "null_contexts"]


# ---- the identity loss -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use", [(), ("v",), ("v", "scaled_contexts")])
def test_the_identity_loss_judges_what_a_few_steps_of_ddim_draw(use):
    noise, own, face = draw(16, 1, 2, 2), F.normalize(draw(16, 4, seed=1)), draw(16, 1, 2, 2, seed=2)
    t, asked, judged = torch.arange(16) * 999 % 1000, [], []

    def knows(x_t: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """The prediction with which each image becomes `face`, whatever the noise."""
        asked.append((t.tolist(), torch.is_grad_enabled()))
        torch.testing.assert_close(contexts, own[:2] * context_scale(use, 4), rtol=0, atol=1e-12)
        alpha_bar = ALPHA_BARS[t][:, None, None, None]
        eps = (x_t - alpha_bar.sqrt() * face[:2]) / (1 - alpha_bar).sqrt()
        return v_target(face[:2], eps, alpha_bar) if "v" in use else eps

    def embeddings_of(x_0: torch.Tensor) -> torch.Tensor:
        judged.append(x_0)
        return x_0.flatten(1) * torch.tensor([1.0, 2.0, -1.0, 0.5])

    loss = identity_loss(knows, embeddings_of, noise, t, own, ALPHA_BARS, use)
    torch.testing.assert_close(judged[0], face[:2], rtol=0, atol=1e-9)  # an eighth of the batch
    embeddings = face[:2].flatten(1) * torch.tensor([1.0, 2.0, -1.0, 0.5])
    cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(embeddings, own[:2], strict=True)]
    assert loss.item() == pytest.approx(1 - sum(cosines) / 2, abs=1e-5)
    # from pure noise in even steps to where t says, in 200 .. 700; only the last one is differentiated through
    last = [200, 699]
    expected = [[999 + (end - 999) * k // JUDGED_STEPS for end in last] for k in range(JUDGED_STEPS + 1)]
    assert [steps for steps, _ in asked] == expected and expected[0] == [999, 999] and expected[-1] == last
    assert [with_gradient for _, with_gradient in asked] == [False] * JUDGED_STEPS + [True]


def test_the_identity_loss_differentiates_the_network():
    network = nn.Conv2d(1, 1, 1, dtype=torch.float64)
    loss = identity_loss(lambda x_t, t, contexts: network(x_t), lambda x_0: x_0.flatten(1), draw(2, 1, 2, 2),
                         torch.tensor([3, 500]), F.normalize(draw(2, 4, seed=1)), ALPHA_BARS, ("v",))
    loss.backward()
    assert network.weight.grad.abs().item() > 1e-6 and 0 < loss.item() < 2


# ---- together --------------------------------------------------------------------------------------------------------

class TinyUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.context = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        return self.convolution(x_t) + (self.context(contexts) * t[:, None] / T)[:, :, None, None]


class TinyRecogniser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 8)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        assert faces.shape[1:] == (3, 112, 112)
        return self.linear(faces[:, :, 20:90:7].mean(dim=(2, 3)))


def decode(x_0: torch.Tensor, quantised: bool) -> torch.Tensor:
    assert not quantised
    return F.interpolate(x_0[:, :3], scale_factor=4)


@pytest.mark.parametrize("use", [(), ("v", "scaled_contexts")])
def test_the_generator_s_loss_is_the_paper_s_and_so_much_of_the_identity_s(use):
    unet, autoencoder, recogniser = TinyUNet(), nn.Module(), TinyRecogniser().requires_grad_(False)
    autoencoder.decode = decode
    x_0, noise, own = draw(8, 4, 8, 8).float(), draw(8, 4, 8, 8, seed=1).float(), F.normalize(draw(8, 8, seed=2).float())
    t, contexts = torch.arange(8) * 120, own * context_scale(use, 8)

    def loss(identity: float) -> torch.Tensor:
        return GeneratorLoss(unet, autoencoder, recogniser, linear_betas(), use, identity, False, 12)(
            x_0, noise, t, contexts, own)

    paper = diffusion_loss(unet, x_0, noise, t, contexts, ALPHA_BARS.float(), v_target if "v" in use else None)
    plain, half, whole = (loss(identity) for identity in (0.0, 0.5, 1.0))
    assert plain.item() == pytest.approx(paper.item(), abs=1e-6)
    assert (whole - plain).item() == pytest.approx(2 * (half - plain).item(), abs=1e-5) and 1e-3 < (whole - plain).item() < 2
    (whole - plain).backward()
    assert unet.context.weight.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compiled_the_generator_learns_the_same():
    unet, autoencoder, recogniser = TinyUNet(), nn.Module(), TinyRecogniser().requires_grad_(False)
    autoencoder.decode = decode
    x_0, noise, own = draw(8, 4, 8, 8).float(), draw(8, 4, 8, 8, seed=1).float(), F.normalize(draw(8, 8, seed=2).float())
    functions = []

    def gradients(compiled: Callable) -> torch.Tensor:
        unet.zero_grad()
        loss = GeneratorLoss(unet, autoencoder, recogniser, linear_betas(), ("v",), 0.5, False, 12, compiled)
        loss(x_0, noise, torch.arange(8) * 120, own, own).backward()
        return torch.cat([weight.grad.flatten() for weight in unet.parameters()])

    eager = gradients(lambda function: function)
    found = gradients(lambda function: functions.append(function) or torch.compile(function))
    assert functions[0] == unet.forward and len(functions) == 2  # and the decoder's
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-5)
