"""The first stage's batches and losses: pixels, colours, a recogniser's early features and embeddings, a discriminator."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models.autoencoder import Autoencoder
from utils.recognition.augmentation import network_input
from utils.training.draws import Draws

CHROMA = 1.0  # weight of the colours: most of an image is its brightness, and without this colours drift to brown
PERCEPTUAL, IDENTITY = 0.1, 0.15  # weights of the recogniser's early features, and of 1 - cosine of its embeddings
LATENT_NOISE = 0.1  # keeps neighbouring latents alike
LATENT_PENALTY = 0.01  # of their mean square: without it the encoder would outgrow the noise


@dataclass(frozen=True)
class ImageBatches:
    """Images of crops, half of them mirrored."""

    crops: np.ndarray  # [N, S, S, 3] uint8 RGB
    rows: np.ndarray  # of the crops to train on
    latent_shape: tuple[int, int, int]  # of the first stage
    device: torch.device

    def of(self, rows: np.ndarray) -> Tensor:
        """Some crops as they are, [B, 3, S, S] in [-1, 1]."""
        return network_input(self.crops[rows], self.device)

    def mirrored(self, draws: Draws, numbers: np.ndarray) -> tuple[Tensor]:
        images = self.of(self.rows[numbers])
        return (torch.where((draws.uniform() < 0.5)[:, None, None, None], images.flip(3), images),)

    def with_noise(self, draws: Draws, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images, and standard normal values of the latents' shape."""
        return *self.mirrored(draws, numbers), draws.normal(*self.latent_shape)


class DecodingLoss(nn.Module):
    """How decoded latents differ from the images [B, 3, H, W] in [-1, 1].

    Args:
        judge: images -> a recogniser's early feature maps and its embeddings.
        discriminator, adversarial: of adversarial_loss, and the weight of its part that the decoder learns from; None: none.
    """

    def __init__(self, autoencoder: Autoencoder, judge: Callable[[Tensor], tuple[list[Tensor], Tensor]], bf16: bool,
                 compiled: Callable[[Callable], Callable], discriminator: nn.Module | None = None,
                 adversarial: float = 0.0) -> None:
        super().__init__()
        self.autoencoder, self.judge, self.bf16 = autoencoder, judge, bf16
        self.discriminator, self.adversarial = discriminator, adversarial
        self.encode, self.decode = compiled(autoencoder.encode), compiled(partial(autoencoder.decode, quantised=False))

    def forward(self, images: Tensor) -> Tensor:
        """From quantised latents: the decoder alone learns."""
        with torch.no_grad(), self._autocast(images):
            latents = self.encode(images).float()
        return self.difference(self.autoencoder.quantize(latents).requires_grad_(), images)

    def difference(self, latents: Tensor, images: Tensor) -> Tensor:
        """How far decoded latents [B, C, h, w] are from images [B, 3, H, W], a scalar."""
        judged = len(images) // 2  # half of them, since judging takes longer than decoding
        with self._autocast(images):
            decoded = self.decode(latents)
            adversarial = 0.0 if self.discriminator is None else adversarial_loss(self.discriminator, decoded, images,
                                                                                  self.adversarial)
        with self._autocast(images, images.device.type != "cpu"):  # depthwise convolutions are slower in bfloat16 there
            with torch.no_grad():
                features, embeddings = self.judge(images[:judged])
            decoded_features, decoded_embeddings = self.judge(decoded[:judged].float())
        perceptual = sum(F.l1_loss(*pair) for pair in zip(decoded_features, features, strict=True))
        identity = (1 - F.cosine_similarity(decoded_embeddings, embeddings)).mean()
        return pixel_loss(decoded.float(), images) + PERCEPTUAL * perceptual + IDENTITY * identity + adversarial

    def _autocast(self, images: Tensor, allowed: bool = True) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16 and allowed)


class ContinuousLoss(DecodingLoss):
    """The same from continuous latents: encoder and decoder learn."""

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """`noise`: standard normal values of the latents' shape."""
        with self._autocast(images):
            latents = self.encode(images).float()
        return self.difference(latents + LATENT_NOISE * noise, images) + LATENT_PENALTY * latents.square().mean()


def pixel_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """The mean absolute difference, and CHROMA times that of the colours: what is left without each pixel's mean over RGB."""
    difference = decoded - images
    return difference.abs().mean() + CHROMA * (difference - difference.mean(dim=1, keepdim=True)).abs().mean()


def adversarial_loss(discriminator: nn.Module, decoded: Tensor, images: Tensor, weight: float) -> Tensor:
    """LDM's hinge loss (arXiv 2112.10752), both sides of it in one: each learns from its own part alone.

    Args:
        discriminator: images [B, 3, H, W] -> how real their patches look.
        weight: of the part that the decoder learns from.
    """
    frozen = {name: weights.detach() for name, weights in discriminator.named_parameters()}
    fooled = -functional_call(discriminator, frozen, (decoded,)).float().mean()
    real, unreal = discriminator(images).float(), discriminator(decoded.detach()).float()
    return weight * fooled + (F.relu(1 - real).mean() + F.relu(1 + unreal).mean()) / 2
