"""Speed of embedding aligned faces, as stages 1, 5 and 7 do it: from arrays in memory to embeddings on the host.

    python -m benchmarks.embedding [--backbones iresnet100,mobilefacenet] [--faces 20000] [--device auto]

Random weights and faces: the speed does not depend on them. Reading and decoding files is not counted.
"""
import argparse
import time

import numpy as np
import torch

from benchmarks.sampling import name_of
from models.backbones import BACKBONES
from utils.faces.template import SIZE
from utils.recognition.embedding import BATCH, embed
from utils.runtime import ranks as distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="iresnet100,iresnet50,mobilefacenet")
    parser.add_argument("--faces", type=int, default=20_000)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    device = distributed.setup(arguments.device).device
    faces = np.random.default_rng(0).integers(0, 256, (256, SIZE, SIZE, 3), dtype=np.uint8)
    rows = []
    for name in arguments.backbones.split(","):
        backbone = with_statistics(BACKBONES[name](0.0))

        def embed_some(number: int, backbone: torch.nn.Module = backbone) -> float:
            begin = time.perf_counter()
            embed(backbone, range(number), device, read=lambda row: faces[row % len(faces)])
            return time.perf_counter() - begin

        embed_some(min(BATCH[device.type], arguments.faces))  # choice of kernels
        rows.append(f"| {name} | {arguments.faces / embed_some(arguments.faces):,.0f} |")
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; fp32, batch {BATCH[device.type]}\n"
          "| backbone | embeddings/s |\n|---|---|", *rows, sep="\n")


@torch.no_grad()
def with_statistics(backbone: torch.nn.Module) -> torch.nn.Module:
    """The network, with its batch norms' statistics those of a batch of noise.

    Without, every block doubles what it gets, and iresnet100 ends at numbers that are not finite.
    """
    for module in backbone.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    backbone.train()(2 * torch.rand(8, 3, SIZE, SIZE) - 1)
    return backbone


if __name__ == "__main__":
    main()
