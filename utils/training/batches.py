"""What the first stage and the generator are shown at a step: batches of images, of latents and contexts."""
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.recognition.augmentation import network_input
from utils.training.draws import Draws
from utils.training.extras import Partners, altered


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


@dataclass(frozen=True)
class GeneratorBatches:
    """What GeneratorLoss takes: x_0, noise, t, contexts as the network sees them, contexts as they are."""

    latents: np.ndarray  # [2, N, C, h, w], of the crops and of their mirror images
    contexts: np.ndarray  # [N, D]
    rows: np.ndarray  # of the faces to train on
    partners: Partners  # of these
    use: Collection[str]  # names in EXTRAS
    T: int
    device: torch.device

    def __call__(self, draws: Draws, numbers: np.ndarray) -> tuple[Tensor, ...]:
        mirrored = (draws.uniform_on_host() < 0.5).astype(int)
        x_0 = self._to_device(self.latents[mirrored, self.rows[numbers]].astype(np.float32))
        noise, t = draws.normal(*self.latents.shape[2:]), draws.integers(self.T)
        own = self._to_device(self.contexts[self.rows[numbers]])
        other = self._to_device(self.contexts[self.rows[self.partners.other(numbers, draws.uniform_on_host())]])
        x_0, shown = altered(x_0, own, other, self.use, draws)
        return x_0.contiguous(memory_format=torch.channels_last), noise, t, shown, own

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)  # else it waits for the step before
