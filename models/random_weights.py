"""Random weights in the published layout, to try the pipeline where the published ones are not to be had.

    python -m models.random_weights --size small output/random_weights

writes into the folder what a published model consists of:
    .hydra/config.yaml, checkpoints/ema_averaged_model.ckpt      the diffusion model
    first_stage_encoder_state_dict.pt, first_stage_decoder_state_dict.pt
Its pictures are coloured noise and mean nothing.
"""
import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from models.autoencoder import Autoencoder, to_published
from models.published import EPS_PREFIX, schedule_tables
from models.unet import ConditionalUNet
from utils.diffusion.solvers import linear_betas
from utils.runtime.errors import run_script
from utils.runtime.files import write_text, write_torch

ENCODER_FILE = "first_stage_encoder_state_dict.pt"
DECODER_FILE = "first_stage_decoder_state_dict.pt"

MODEL = {"input_channels": 3, "attention_heads": -1, "attention_head_channels": 32, "condition_type": "CA",
         "is_context_conditional": True, "n_context_classes": 0, "context_input_channels": 512,
         "learn_empty_context": False, "context_dropout_probability": 0.25}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "image_size": 64,
        "model": {"initial_channels": 32, "channel_multipliers": [1, 2], "is_attention": [False, True],
                  "n_blocks_per_resolution": 1, "context_channels": 32},
        "first_stage": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "num_codes": 512},
    },
    "full": {  # as published
        "image_size": 128,
        "model": {"initial_channels": 96, "channel_multipliers": [1, 2, 2, 2],
                  "is_attention": [False, True, True, True], "n_blocks_per_resolution": 2, "context_channels": 256},
        "first_stage": {"block_out_channels": (128, 256, 512), "layers_per_block": 2, "num_codes": 8192},
    },
}


def write(folder: Path | str, size: str, seed: int = 0) -> None:
    """Write random weights of `size`, `small` (64 px) or `full` (128 px, every size as published), into `folder`."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        unet, autoencoder = (fill_zeros(network) for network in networks(size))
        for block in unet.attention_blocks:
            block.cross_attention.proj_out.weight *= 10  # so that identities look different
        pass_through(unet)
        # Codes as far apart as the latents, and more contrast: otherwise every picture is the same grey.
        nn.init.normal_(autoencoder.vq.quantize.embedding.weight, std=10)
        autoencoder.vq.decoder.conv_out.weight *= 2
    encoder, decoder = to_published(autoencoder)
    eps_model = {EPS_PREFIX + name: tensor for name, tensor in unet.state_dict().items()}
    write_torch(folder / "checkpoints" / "ema_averaged_model.ckpt", schedule_tables(linear_betas()) | eps_model)
    write_torch(folder / ENCODER_FILE, encoder)
    write_torch(folder / DECODER_FILE, decoder)
    write_text(folder / ".hydra" / "config.yaml", yaml.safe_dump(config(size), sort_keys=False))


def config(size: str) -> dict[str, Any]:
    """The published configuration, as far as it matters to the weights."""
    return {
        "latent_diffusion": True,
        "constants": {"image_size": SIZES[size]["image_size"], "input_channels": 3, "n_classes": 0},
        "model": {"_target_": "models.diffusion.unet.ConditionalUNet", **MODEL, **SIZES[size]["model"],
                  "input_channels": "${constants.input_channels}", "n_context_classes": "${constants.n_classes}"},
        "diffusion": {"_target_": "diffusion.ddpm.DenoisingDiffusionProbabilisticModel", "eps_model": "${model}",
                      "T": 1000, "schedule_type": "linear"},
    }


def networks(size: str) -> tuple[ConditionalUNet, Autoencoder]:
    """The epsilon network and the first stage, as they start out."""
    return (ConditionalUNet(**MODEL, **SIZES[size]["model"]),
            Autoencoder(**SIZES[size]["first_stage"], latent_channels=3, code_channels=3))


def fill_zeros(network: nn.Module) -> nn.Module:
    """Make the parameters that start at zero random too, so that every one of them shows in the pictures."""
    for parameter in network.parameters():
        if not parameter.any():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1000
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return network


def pass_through(unet: ConditionalUNet) -> None:
    """Lead x_t past the random layers, so that eps is x_t and a little more, about as it should be for pure noise.

    From eps that is random altogether, sampling would arrive at an x_0 in the hundreds.
    """
    last = unet.up[-1].res
    channels = unet.final.in_channels
    # Pairs of channels hold x and -x, since silu(x) - silu(-x) = x.
    signs = torch.tensor([1.0, -1.0]).repeat(channels // 2)[:, None]
    copies = signs * nn.functional.one_hot(torch.arange(channels) // 2 % 3, 3)
    unet.image_proj.weight[:, :, 1, 1] = copies
    last.shortcut.weight *= 0.1
    last.shortcut.weight[:, channels:, 0, 0] += torch.eye(channels)
    last.conv2.weight *= 0.1
    unet.final.weight *= 0.1
    unet.final.weight[:, :, 1, 1] += 2 * (copies / copies.abs().sum(dim=0)).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.size, arguments.seed)
    print(f"random weights ({arguments.size}) are in {arguments.folder}: their pictures are noise and mean nothing")


if __name__ == "__main__":
    run_script(main)
