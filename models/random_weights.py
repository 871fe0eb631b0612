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

from models.autoencoder import to_published
from models.published import EPS_PREFIX
from models.schedule import linear_betas, schedule_tables
from models.sizes import SIZES, build, unet_settings
from models.unet import ConditionalUNet
from utils.runtime.errors import run_script
from utils.runtime.files import write_text, write_torch

ENCODER_FILE = "first_stage_encoder_state_dict.pt"
DECODER_FILE = "first_stage_decoder_state_dict.pt"
CONTEXT_DIMENSION = 512

def write(folder: Path | str, size: str, seed: int = 0) -> None:
    """Write random weights of an entry of SIZES, such as `small` or `published`, into `folder`."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        unet, autoencoder = (fill_zeros(network) for network in build(size))
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
        "model": {"_target_": "models.diffusion.unet.ConditionalUNet", **unet_settings(size, CONTEXT_DIMENSION),
                  "input_channels": "${constants.input_channels}", "n_context_classes": "${constants.n_classes}"},
        "diffusion": {"_target_": "diffusion.ddpm.DenoisingDiffusionProbabilisticModel", "eps_model": "${model}",
                      "T": 1000, "schedule_type": "linear"},
    }


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
