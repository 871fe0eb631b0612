"""What the miniature's training does otherwise than IDiff-Face's (arXiv 2308.04995); `extras.use` and `extras.identity`.

docs/training.md has what was measured of them: the identity loss alone so far.
"""
from collections.abc import Callable, Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.diffusion.latent_diffusion import eps_of_v
from utils.training.draws import Draws

# Name -> its numbers, which go into a run's record.
EXTRAS: dict[str, dict[str, float]] = {
    "v": {},  # the network predicts v rather than eps (arXiv 2202.00512)
    "adamw": {"weight_decay": 0.01},  # AdamW, its rate flat, then a cosine; instead of Adam with warm restarts
    "scaled_contexts": {},  # contexts whose numbers are about 1, rather than of unit length
    "noise": {"contexts": 0.05, "latents": 0.05},  # standard deviations, in units of their own
    "same_person": {"part": 0.15},  # of the contexts, taken from another image of the same person
    "null_contexts": {"part": 0.1},  # of the contexts, replaced by the zero vector
}
# The recogniser judges what the network draws by itself, as in sampling: predictions from noisy training images already
# show who it is, and the context would be of little use. A part of a batch, a few steps of DDIM, down to a timestep at
# which much is still undecided.
JUDGED_PART, JUDGED_STEPS, JUDGED_T = 0.125, 4, (200, 700)


def v_target(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0


def context_scale(use: Collection[str], dimension: int) -> float:
    """What contexts are multiplied by in training; the saved weights take unit contexts all the same."""
    return dimension**0.5 if "scaled_contexts" in use else 1.0


def altered(x_0: Tensor, own: Tensor, other: Tensor, use: Collection[str], draws: Draws) -> tuple[Tensor, Tensor]:
    """Latents [B, C, h, w] and contexts [B, D] as the network is shown them.

    Args:
        own, other: [B, D] unit contexts, of the image and of another one of the same person.
    """
    scale = context_scale(use, own.shape[1])
    contexts = own
    if "same_person" in use:
        contexts = torch.where((draws.uniform() < EXTRAS["same_person"]["part"])[:, None], other, own)
    contexts = contexts * scale
    if "noise" in use:
        x_0 = x_0 + EXTRAS["noise"]["latents"] * draws.normal(*x_0.shape[1:])
        contexts = contexts + EXTRAS["noise"]["contexts"] * scale / own.shape[1] ** 0.5 * draws.normal(own.shape[1])
    if "null_contexts" in use:
        contexts = torch.where((draws.uniform() < EXTRAS["null_contexts"]["part"])[:, None], 0.0, contexts)
    return x_0, contexts


class Partners:
    """Other images of the same person, for `same_person`.

    Args:
        labels: [N] identities, those of one person side by side.
    """

    def __init__(self, labels: np.ndarray) -> None:
        _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.count = first[inverse], counts[inverse]

    def other(self, numbers: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """For each image number another one of the same person, by a number in [0, 1); itself where there is none."""
        first, others = self.first[numbers], self.count[numbers] - 1
        step = 1 + np.minimum((uniform * others).astype(int), np.maximum(others - 1, 0))
        return first + (numbers - first + step) % self.count[numbers]


def identity_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], embeddings_of: Callable[[Tensor], Tensor], noise: Tensor,
                  t: Tensor, own: Tensor, alpha_bars: Tensor, use: Collection[str]) -> Tensor:
    """1 - cosine between contexts and the embeddings of what the network draws for them by some steps of DDIM, a scalar.

    Args:
        network: as in diffusion_loss.
        embeddings_of: x_0 [B, C, h, w] -> the recogniser's embeddings of the decoded faces [B, D], differentiable.
        noise, t, own: of a step's batch, of which the first JUDGED_PART is judged; t chooses where DDIM ends.
    """
    judged = max(1, int(JUDGED_PART * len(t)))
    x_t, t, own = noise[:judged], t[:judged], own[:judged]
    T, (low, high) = len(alpha_bars), JUDGED_T
    last = low + t * (high - low) // T
    for step in range(JUDGED_STEPS + 1):
        here, below = (T - 1 + (last - T + 1) * k // JUDGED_STEPS for k in (step, min(step + 1, JUDGED_STEPS)))
        alpha_bar, next_alpha_bar = (alpha_bars[k][:, None, None, None] for k in (here, below))
        with torch.set_grad_enabled(step == JUDGED_STEPS):
            predicted = network(x_t, here, own * context_scale(use, own.shape[1]))
            eps = eps_of_v(predicted, x_t, alpha_bar) if "v" in use else predicted
            x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            x_t = next_alpha_bar.sqrt() * x_0 + (1 - next_alpha_bar).sqrt() * eps
    return (1 - F.cosine_similarity(embeddings_of(x_0).float(), own)).mean()
