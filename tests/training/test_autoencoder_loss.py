"""The first stage's losses, written out on an autoencoder of a few numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.patch_discriminator import PatchDiscriminator
from utils.training.autoencoder_loss import (
    CHROMA,
    IDENTITY,
    LATENT_NOISE,
    LATENT_PENALTY,
    PERCEPTUAL,
    ContinuousLoss,
    DecodingLoss,
    adversarial_loss,
)


class TinyAutoencoder(nn.Module):
    """Latents are a mixture of the channels, codes the nearest halves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decoder = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)

    def quantize(self, latents: torch.Tensor) -> torch.Tensor:
        return (2 * latents).round().detach() / 2

    def decode(self, latents: torch.Tensor, quantised: bool) -> torch.Tensor:
        assert not quantised  # they were, or must not be
        return self.decoder(latents)


def judge(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [images[:, :, ::2].square(), images[..., ::2]], images.mean(dim=3).flatten(1)


def by_hand(decoded: torch.Tensor, images: torch.Tensor) -> float:
    """Pixels and colours of all images; early features and embeddings of the first half."""
    colours, decoded_colours = images - images.mean(dim=1, keepdim=True), decoded - decoded.mean(dim=1, keepdim=True)
    pixels = (decoded - images).abs().mean() + CHROMA * (decoded_colours - colours).abs().mean()
    judged, of_images = decoded[:2], images[:2]
    features = ((judged[:, :, ::2] ** 2 - of_images[:, :, ::2] ** 2).abs().mean()
                + (judged[..., ::2] - of_images[..., ::2]).abs().mean())
    cosines = [F.cosine_similarity(a.mean(dim=2).flatten(), b.mean(dim=2).flatten(), dim=0)
               for a, b in zip(judged, of_images, strict=True)]
    return (pixels + PERCEPTUAL * features + IDENTITY * (1 - sum(cosines) / 2)).item()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_decoding_trains_the_decoder_alone_from_codes(images):
    autoencoder = TinyAutoencoder()
    loss = DecodingLoss(autoencoder, judge, False, lambda function: function)(images)
    decoded = autoencoder.decoder((2 * autoencoder.encode(images)).round() / 2)
    assert loss.item() == pytest.approx(by_hand(decoded, images), abs=1e-6)
    loss.backward()
    assert autoencoder.decoder.weight.grad.abs().max() > 0 and autoencoder.encode.weight.grad is None


def test_continuous_latents_train_both_and_are_kept_small(images):
    autoencoder, noise = TinyAutoencoder(), torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    loss = ContinuousLoss(autoencoder, judge, False, lambda function: function)(images, noise)
    latents = autoencoder.encode(images)
    expected = by_hand(autoencoder.decoder(latents + LATENT_NOISE * noise), images) \
        + LATENT_PENALTY * (latents**2).mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert autoencoder.decoder.weight.grad.abs().max() > 0 and autoencoder.encode.weight.grad.abs().max() > 0


def test_each_side_of_the_adversarial_loss_learns_from_its_own_part_alone(images):
    torch.manual_seed(0)
    discriminator = nn.Conv2d(3, 1, 1)
    decoded = (0.5 * images).requires_grad_()
    loss = adversarial_loss(discriminator, decoded, images, 0.3)
    real, unreal = discriminator(images), discriminator(decoded)
    hinge = (F.relu(1 - real).mean() + F.relu(1 + unreal).mean()) / 2
    assert loss.item() == pytest.approx((hinge - 0.3 * unreal.mean()).item(), abs=1e-6)
    to_decoded, to_weights = torch.autograd.grad(loss, [decoded, discriminator.weight])
    torch.testing.assert_close(to_decoded, torch.autograd.grad(-0.3 * discriminator(decoded).mean(), decoded)[0])
    torch.testing.assert_close(to_weights, torch.autograd.grad(hinge, discriminator.weight)[0])


def test_a_discriminator_learns_to_tell_and_judges_patches():
    torch.manual_seed(0)
    discriminator, smooth = PatchDiscriminator(8), torch.full((4, 3, 64, 64), 0.2)
    noisy = smooth + 0.3 * torch.randn(4, 3, 64, 64)
    assert discriminator(smooth).shape == (4, 1, 14, 14)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        adversarial_loss(discriminator, smooth, noisy, 1.0).backward()
        optimizer.step()
    assert discriminator(noisy).mean() - discriminator(smooth).mean() > 1
