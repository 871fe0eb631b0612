"""The generator's batches, and its loss as a module, so that the ranks can share its gradients."""
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.schedule import alpha_bars
from models.unet import ConditionalUNet
from utils.training.diffusion_loss import diffusion_loss
from utils.training.draws import Draws
from utils.training.extras import Partners, altered, identity_loss, v_target
from utils.training.faces import of_canvas


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

    def __call__(self, draws: Draws, numbers: np.ndarray) -> tuple[torch.Tensor, ...]:
        mirrored = (draws.uniform_on_host() < 0.5).astype(int)
        x_0 = self._to_device(self.latents[mirrored, self.rows[numbers]].astype(np.float32))
        noise, t = draws.normal(*self.latents.shape[2:]), draws.integers(self.T)
        own = self._to_device(self.contexts[self.rows[numbers]])
        other = self._to_device(self.contexts[self.rows[self.partners.other(numbers, draws.uniform_on_host())]])
        x_0, shown = altered(x_0, own, other, self.use, draws)
        return x_0.contiguous(memory_format=torch.channels_last), noise, t, shown, own

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)  # else it waits for the step before


class GeneratorLoss(nn.Module):
    """IDiff-Face's loss, and the miniature's where `use` and `identity` say so.

    Args:
        identity: weight of identity_loss; 0 is off.
        margin: of the crops, px of 112.
        compiled: fuses the network's operations, or leaves them.
    """

    def __init__(self, unet: ConditionalUNet, autoencoder: nn.Module, recogniser: nn.Module, betas: torch.Tensor,
                 use: Collection[str], identity: float, bf16: bool, margin: int,
                 compiled: Callable[[Callable], Callable] = lambda function: function) -> None:
        super().__init__()
        self.unet, self.autoencoder, self.recogniser = unet, autoencoder, recogniser
        self.use, self.identity, self.bf16, self.margin = use, identity, bf16, margin
        self.of_batch = compiled(unet.forward)  # for the judged part, of another shape, it would be compiled once more
        self.decode = compiled(partial(autoencoder.decode, quantised=False))
        self.register_buffer("alpha_bars", torch.tensor(alpha_bars(betas)))

    def forward(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor,
                own: torch.Tensor) -> torch.Tensor:
        target = v_target if "v" in self.use else None
        loss = diffusion_loss(partial(self.predict, self.of_batch), x_0, noise, t, contexts, self.alpha_bars, target)
        if self.identity:
            loss = loss + self.identity * identity_loss(partial(self.predict, self.unet), self.embeddings_of, noise, t, own,
                                                        self.alpha_bars, self.use)
        return loss

    def predict(self, network: Callable, x_t: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        # on a CPU the fused attention's backward pass is several times slower than plain matrix products
        attention = sdpa_kernel(SDPBackend.MATH) if x_t.device.type == "cpu" else nullcontext()
        with self._autocast(x_t), attention:
            return network(x_t, t, contexts).float()

    def embeddings_of(self, x_0: torch.Tensor) -> torch.Tensor:
        with self._autocast(x_0):
            images = self.decode(x_0)
        with self._autocast(x_0, x_0.device.type != "cpu"):  # depthwise convolutions are slower in bfloat16 there
            return self.embeddings_of_images(images.float())

    def embeddings_of_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.recogniser(of_canvas(images, self.margin))

    def _autocast(self, x: torch.Tensor, allowed: bool = True) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and allowed)
