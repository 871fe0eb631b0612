"""train_fr.py with a network of some thousand parameters in place of iresnet18: python -m tests.tiny_training."""
import torch
from torch import nn

import train_fr
from models import backbones
from utils.runtime.errors import run_script


class TinyNet(nn.Module):
    """No batch norm, so that a batch's embeddings do not depend on how it is split over ranks."""

    def __init__(self, num_features: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.PReLU(), nn.Dropout(dropout), nn.Flatten(),
                                    nn.Linear(8 * 7 * 7, num_features))

    def forward(self, faces: torch.Tensor, template: str = "arcface") -> torch.Tensor:
        return self.layers(faces)


def main() -> None:
    backbones.iresnet18 = TinyNet
    train_fr.main()


if __name__ == "__main__":
    run_script(main)
