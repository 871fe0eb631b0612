"""train_autoencoder.py or train_diffusion.py with networks of some thousand parameters, whatever recogniser is named:
python -m tests.tiny_generator train_diffusion [settings]."""
import importlib
import sys

import torch
from torch import nn

from models.sizes import SIZES
from utils.runtime.errors import run_script
from utils.training import faces

TINY = {
    "image_size": 32,
    "unet": {"initial_channels": 32, "channel_multipliers": [1, 2], "is_attention": [False, True],
             "n_blocks_per_resolution": 1, "context_channels": 32, "context_dropout_probability": 0.1},
    "first_stage": {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "latent_channels": 4, "code_channels": 4,
                    "num_codes": 32, "code_parts": 2},
}


class TinyRecogniser(nn.Module):
    DIMENSION = 16

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.early = nn.Conv2d(3, 8, 16, stride=16)
            self.embedding = nn.Linear(8 * 7 * 7, self.DIMENSION)

    def with_early_features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        early = self.early(images)
        return [early], self.embedding(early.relu().flatten(1)).float()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.with_early_features(images)[1]


def shrink(script, patch=setattr) -> None:
    """Make a script small: four images a step, half of the people held out."""
    patch(script, "load_backbone", lambda file: TinyRecogniser())
    if hasattr(script, "BATCH_SIZE"):
        patch(script, "BATCH_SIZE", 4)
    patch(faces, "HELD_OUT_PART", 2)


def main() -> None:
    script = importlib.import_module(sys.argv.pop(1))
    shrink(script)
    SIZES["tiny"] = TINY
    script.main()


if __name__ == "__main__":
    run_script(main)
