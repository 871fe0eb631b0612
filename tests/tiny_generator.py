"""train_autoencoder.py or train_diffusion.py with a recogniser of some thousand parameters, whatever file is named:
python -m tests.tiny_generator train_diffusion [settings]."""
import importlib
import sys

import torch
from torch import nn

from utils.runtime.errors import run_script


class TinyRecogniser(nn.Module):
    DIMENSION = 16

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.early = nn.Conv2d(3, 8, 16, stride=16)
            self.embedding = nn.Linear(8 * 7 * 7, self.DIMENSION)

    def with_early_features(self, faces: torch.Tensor, template: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        early = self.early(faces)
        return [early], self.embedding(early.relu().flatten(1)).float()

    def forward(self, faces: torch.Tensor, template: str = "arcface") -> torch.Tensor:
        return self.with_early_features(faces, template)[1]


def main() -> None:
    script = importlib.import_module(sys.argv.pop(1))
    script.load_backbone = lambda file: TinyRecogniser()
    script.REPORT_SECONDS = -1  # the loss of every step
    script.main()


if __name__ == "__main__":
    run_script(main)
