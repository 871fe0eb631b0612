"""Writes a trained diffusion model in the published layout: what models.published.load_diffusion reads."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from models.published import EPS_PREFIX, load_diffusion
from models.schedule import schedule_tables
from models.state_dicts import first_difference
from models.unet import ConditionalUNet
from utils.runtime.errors import UserError
from utils.runtime.files import write_safetensors, write_text

OF_LATENTS = ("image_proj.weight", "final.weight", "final.bias")  # weights whose shapes go by the latents' channels


def write_diffusion(folder: Path, unet_settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor], betas: torch.Tensor,
                    image_size: int, prediction: str) -> None:
    """Write `.hydra/config.yaml` and `checkpoints/ema_averaged_model.safetensors` into `folder`.

    Args:
        unet_settings: the arguments of ConditionalUNet.
        weights: its state dict, of unit contexts.
        prediction: `eps` (as published) or `v`.
    """
    eps_model = {EPS_PREFIX + name: tensor for name, tensor in weights.items()}
    write_safetensors(folder / "checkpoints" / "ema_averaged_model.safetensors", schedule_tables(betas) | eps_model)
    write_text(folder / ".hydra" / "config.yaml", yaml.safe_dump({
        "latent_diffusion": True, "constants": {"image_size": image_size}, "model": dict(unet_settings),
        "diffusion": {"T": len(betas), "schedule_type": "linear", "prediction": prediction}}, sort_keys=False))


def trained_weights(folder: str, unet: ConditionalUNet, scale: float, prediction: str) -> dict[str, torch.Tensor]:
    """Weights in the published layout, for a run on contexts times `scale` to begin with.

    Without those of the first and the last layer where `unet` has latents of another number of channels.

    Raises:
        UserError: they are of another network than `unet`, or predict something else.
    """
    trained, described = load_diffusion(folder)
    weights, own = trained.state_dict(), unet.state_dict()
    if trained.image_proj.in_channels != unet.image_proj.in_channels:
        for name in OF_LATENTS:
            del weights[name], own[name]
    fault = first_difference(own, weights)
    if not fault and described["prediction"] != prediction:
        fault = f"it predicts {described['prediction']}"
    if fault:
        raise UserError(f"diffusion.start_from: {folder} is another network than training.size and extras.use describe: "
                        f"{fault}; give the settings it was trained with")
    return weights | {"context_emb.weight": weights["context_emb.weight"] / scale}
