"""The trained generator: from contexts and noise to images."""
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from config.config import Model, Sampling
from models import published
from models.autoencoder import Autoencoder
from models.prepacked import prepack
from models.schedule import alpha_bars
from models.unet import ConditionalUNet
from utils.diffusion import fitted, solvers
from utils.runtime.errors import UserError
from utils.runtime.files import file_digest
from utils.runtime.ranks import use_bf16

CACHED_TOKENS = 4  # sets of contexts whose tokens are kept


class LatentDiffusion:
    """An identity-conditioned latent diffusion model on one device.

    Args:
        unet: the epsilon network; it is moved to the device and, with bf16, converted.
        autoencoder: the first stage.
        betas: [T].
        latent_shape: (C, h, w).
        prediction: what the network predicts, `eps` or `v`; it is read as eps, in which equation 3 is the same.
        device: where images are drawn.
        bf16: compute in bfloat16; x_t, guidance and the search in the codebook stay float32.
    """

    def __init__(self, unet: ConditionalUNet, autoencoder: Autoencoder, betas: Tensor, latent_shape: tuple[int, int, int],
                 prediction: str, device: torch.device, bf16: bool) -> None:
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.unet = unet.to(device, self.dtype, memory_format=torch.channels_last)
        self.autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
        self.betas, self.latent_shape, self.prediction, self.device = betas, latent_shape, prediction, device
        self.T = len(betas)
        self.tokens: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Tensor]] = {}

    def eps(self, x_t: Tensor, t: int, contexts: Tensor) -> Tensor:
        """The noise predicted in x_t [B, C, h, w] at timestep t for contexts [B, D]: [B, C, h, w] float32."""
        return self._eps(x_t, t, contexts)

    def eps_pair(self, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor) -> tuple[Tensor, Tensor]:
        """`eps` for both contexts in one batch, in which what no context reaches is computed once."""
        return self._eps(x_t, t, c_pos, c_neg).chunk(2)

    def alpha_bar(self, t: int) -> float:
        return self.alpha_bars[t]

    @torch.no_grad()
    def latents(self, contexts: Tensor, negatives: Tensor | None, noise: Callable[[int], Tensor], guide: Callable,
                solver: str, steps: int | Sequence[int], as_published: bool = False) -> Tensor:
        """Draw x_0 [B, C, h, w] float32; the arguments are those of `images`."""
        contexts = contexts.to(self.device)
        negatives = None if negatives is None else negatives.to(self.device)
        denoise = guide(self, contexts, negatives)
        return solvers.sample(denoise, noise(self.T), solver, steps, noise, as_published, self.betas)

    @torch.no_grad()
    def images(self, contexts: Tensor, negatives: Tensor | None, noise: Callable[[int], Tensor], guide: Callable,
               solver: str, steps: int | Sequence[int], as_published: bool = False) -> Tensor:
        """Draw images.

        Args:
            contexts: [B, D], unit norm.
            negatives: [B, D]; None where `guide` does not ask for them.
            noise: t -> the noise of timestep t [B, C, h, w] on the device and, at t = T, the prior x_T.
            guide: as utils.diffusion.guidance.guided gives it.
            solver, steps, as_published: see utils.diffusion.solvers.sample.
        Returns:
            [B, 3, H, W] float32, clipped to [-1, 1]; NaN where the network or its weights are not finite.
        """
        x_0 = self.latents(contexts, negatives, noise, guide, solver, steps, as_published)
        # the codebook would lose digits as bfloat16 weights; under autocast it keeps them
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            images = self.autoencoder.decode(x_0).float()
        return images.clamp(-1, 1).where(images.isfinite(), torch.nan)

    @cached_property
    def alpha_bars(self) -> list[float]:
        return alpha_bars(self.betas)

    def _eps(self, x_t: Tensor, t: int, *contexts: Tensor) -> Tensor:
        predicted = self.unet(x_t.to(self.dtype), self._timesteps[t].expand(len(x_t)), self._tokens_of(contexts)).float()
        if self.prediction == "eps":
            return predicted
        return eps_of_v(predicted, x_t.repeat(len(contexts), 1, 1, 1), self.alpha_bars[t])

    @cached_property
    def _timesteps(self) -> Tensor:
        return torch.arange(self.T, device=self.device)  # on the device before they are needed

    def _tokens_of(self, contexts: tuple[Tensor, ...]) -> Tensor:
        """The contexts' tokens, which depend neither on x_t nor on t: computed once for as long as the contexts stay."""
        key = tuple(map(id, contexts))
        if key not in self.tokens:
            if len(self.tokens) == CACHED_TOKENS:
                self.tokens.pop(next(iter(self.tokens)))
            together = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
            # the contexts are kept beside their tokens, so that no other tensor can take their id
            self.tokens[key] = contexts, self.unet.context_tokens(together.to(self.dtype))
        return self.tokens[key][1]


def load_model(model: Model, sampling: Sampling, device: torch.device) -> tuple[LatentDiffusion, list[Path]]:
    """The generator of the settings `model`, and the files that describe it. Raises UserError where they do not fit."""
    step = model.step or None
    unet, settings = published.load_diffusion(model.diffusion, step)
    autoencoder = published.load_first_stage(model.first_stage_encoder, model.first_stage_decoder)
    channels, _, size = settings["latent_shape"]
    if (autoencoder.channels, autoencoder.factor * size) != (channels, settings["image_size"]):
        raise UserError(f"{model.first_stage_decoder}: takes latents of {autoencoder.channels} channels and enlarges them "
                        f"{autoencoder.factor} times, but {model.diffusion} was trained with another first stage, of {channels} "
                        f"channels and {settings['image_size'] / size:g} times; take both from one model")
    solvers.check(sampling.solver, sampling.steps, sampling.as_published, settings["T"], sampling.spacing)
    files = [Path(model.diffusion) / ".hydra" / "config.yaml",
             published.checkpoint_file(Path(model.diffusion) / "checkpoints", step, ema=True), model.first_stage_encoder,
             model.first_stage_decoder]
    if sampling.solver == "fitted" and file_digest(files[1]) != fitted.WEIGHTS:
        raise UserError(f"sampling.solver: fitted was fitted to other weights than {files[1]}; set "
                        "sampling.solver=dpm++ sampling.steps=20, or fit it to them by python -m experiments.solvers fit")
    bf16 = use_bf16(sampling.precision, device)
    model = LatentDiffusion(unet, autoencoder, settings["betas"], settings["latent_shape"], settings["prediction"], device, bf16)
    prepack(model.unet)
    return model, files


def eps_of_v(v: Tensor, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """eps from v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512, appendix D)."""
    return alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x_t


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], clipped, to uint8 [B, H, W, 3], 0 .. 255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
