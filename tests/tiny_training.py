"""train_fr.py with a network of some thousand parameters in place of iresnet18: python -m tests.tiny_training."""
import torch
from torch import nn

import train_fr
from models.backbones import BACKBONES
from utils.recognition import recogniser_training
from utils.runtime.errors import run_script


class TinyNet(nn.Module):
    """No batch norm, so that a batch's embeddings do not depend on how it is split over ranks."""

    num_features = 16

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.PReLU(), nn.Dropout(dropout), nn.Flatten(),
                                    nn.Linear(8 * 7 * 7, self.num_features))

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return self.layers(faces)


def main() -> None:
    BACKBONES["iresnet18"] = TinyNet
    recogniser_training.HELD_OUT_PART = 3  # three of nine people
    train_fr.DROPOUT = 0.0
    train_fr.main()


if __name__ == "__main__":
    run_script(main)
