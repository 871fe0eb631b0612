"""The first stage's losses: pixels, a recogniser's early features and its embeddings."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder

PERCEPTUAL, IDENTITY = 0.1, 0.05  # weights of the recogniser's early features, and of 1 - cosine of its embeddings
LATENT_NOISE = 0.1  # keeps neighbouring latents alike
LATENT_PENALTY = 0.01  # of their mean square: without it the encoder would outgrow the noise


class DecodingLoss(nn.Module):
    """How decoded latents differ from the images [B, 3, H, W] in [-1, 1].

    Args:
        judge: images -> a recogniser's early feature maps and its embeddings.
    """

    def __init__(self, autoencoder: Autoencoder, judge: Callable[[Tensor], tuple[list[Tensor], Tensor]], bf16: bool,
                 compiled: Callable[[Callable], Callable]) -> None:
        super().__init__()
        self.autoencoder, self.judge, self.bf16 = autoencoder, judge, bf16
        self.encode, self.difference = compiled(autoencoder.encode), compiled(self._difference)

    def forward(self, images: Tensor) -> Tensor:
        """From quantised latents: the decoder alone learns."""
        with torch.no_grad(), self._autocast(images):
            latents = self.encode(images).float()
        return self.difference(self.autoencoder.quantize(latents).requires_grad_(), images)

    def _difference(self, latents: Tensor, images: Tensor) -> Tensor:
        judged = len(images) // 2  # half of them, since judging takes longer than decoding
        with self._autocast(images):
            decoded = self.autoencoder.vq.decode(latents, force_not_quantize=True).sample
            with torch.no_grad():
                features, embeddings = self.judge(images[:judged])
            decoded_features, decoded_embeddings = self.judge(decoded[:judged])
        perceptual = sum(F.l1_loss(*pair) for pair in zip(decoded_features, features, strict=True))
        identity = (1 - F.cosine_similarity(decoded_embeddings, embeddings)).mean()
        return F.l1_loss(decoded.float(), images) + PERCEPTUAL * perceptual + IDENTITY * identity

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16)


class ContinuousLoss(DecodingLoss):
    """The same from continuous latents: encoder and decoder learn."""

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """`noise`: standard normal values of the latents' shape."""
        with self._autocast(images):
            latents = self.encode(images).float()
        return self.difference(latents + LATENT_NOISE * noise, images) + LATENT_PENALTY * latents.square().mean()
