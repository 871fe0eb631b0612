"""Speed of training the recogniser, from packed faces to the optimiser's step, and of its loader alone.

    python -m benchmarks.training [--backbone iresnet50] [--batch 512] [--steps 50] [--device auto]

Random faces and weights: the speed does not depend on them. Each row is what train_fr.py does on one device, with
CosFace over 10,000 identities and flip + RandAugment; in bf16 only on a device that is fast at it.
"""
import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampling import PRECISIONS, fast_precisions, matrix_rate, name_of, peak_memory, reset_peak
from models.backbones import BACKBONES
from models.margin_heads import CosFace
from utils.faces.packed import FaceReader
from utils.faces.template import SIZE
from utils.recognition.augmentation import normalise
from utils.recognition.recogniser_training import RecogniserLoss, augmented
from utils.runtime import ranks as distributed

IDENTITIES, GRADIENT_CLIP = 10_000, 5.0
WARM_UP = 5  # steps that are not timed: compilation, choice of kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="iresnet50", choices=tuple(BACKBONES))
    parser.add_argument("--batch", type=int, default=512, help="images a step")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--images", type=int, default=20_000, help="packed faces")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled row out")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    ranks = distributed.setup(arguments.device)
    device, batch = ranks.device, arguments.batch

    flop = count_flop(BACKBONES[arguments.backbone](0.4))
    rates = {name: matrix_rate(PRECISIONS[name], device) for name in fast_precisions(device)}
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"{arguments.backbone}, {flop / 1e9:.1f} GFLOP an image forward and backward, "
          f"batch {batch}; matrix rate {', '.join(f'{name} {rate / 1e12:.3g}' for name, rate in rates.items())} TFLOP/s")

    with tempfile.TemporaryDirectory() as folder:
        reader = FaceReader(pack_random(Path(folder) / "faces.npy", arguments.images), device)
        labels = torch.randint(IDENTITIES, (arguments.images,), device=device)

        def batches(kind: str, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            order = np.random.default_rng(0).integers(0, arguments.images, (steps, batch))
            for faces, numbers in augmented(reader, np.arange(arguments.images), order, 0, 0, kind):
                yield normalise(faces), labels[numbers]

        print("| | images/s | of the matrix rate | peak memory, GB |\n|---|---|---|---|")
        where = "the device's memory" if reader.resident is not None else "disk"
        for kind in ("none", "flip", "randaugment"):
            rate, peak = measure(partial(batches, kind), arguments.steps, lambda faces, labels: None, device)
            print(f"| loader alone, from {where}, augmentation {kind} | {rate:,.0f} | | {peak / 1e9:.1f} |")
        rows = [*((name, False) for name in rates), (list(rates)[-1], True)]
        for name, compiled in rows[:-1] if arguments.no_compile else rows:
            step = training_step(arguments.backbone, device, name == "bf16", compiled)
            rate, peak = measure(partial(batches, "randaugment"), arguments.steps, step, device)
            share = rate * flop / rates[name]
            print(f"| training, {name}{', compiled' * compiled} | {rate:,.0f} | {share:.0%} | {peak / 1e9:.1f} |", flush=True)


def training_step(backbone: str, device: torch.device, bf16: bool, compiled: bool) -> Callable:
    """(faces, labels) -> one update, as utils/training/loop.py makes it."""
    network = BACKBONES[backbone](0.4).to(device, memory_format=torch.channels_last)
    head = CosFace(network.num_features, IDENTITIES, s=64.0, m=0.35).to(device)
    loss = RecogniserLoss(network, head, bf16, torch.compile if compiled else lambda network: network, None).train()
    weights = [weight for weight in (*network.parameters(), *head.parameters()) if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.1, 0.9, weight_decay=5e-4)

    def step(faces: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(faces, labels, labels).backward()
        for module in (network, head):
            torch.nn.utils.clip_grad_norm_(module.parameters(), GRADIENT_CLIP)
        optimizer.step()

    return step


def pack_random(file: Path, images: int) -> np.ndarray:
    """A packed array of random faces, read back as a memory map."""
    faces = np.random.default_rng(0).integers(0, 256, (images, SIZE, SIZE, 3), dtype=np.uint8)
    np.save(file, faces)
    return np.load(file, mmap_mode="r")


def count_flop(backbone: torch.nn.Module) -> float:
    """Floating point operations of one image's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(2, 3, SIZE, SIZE)).sum().backward()  # two, because batch norm needs more than one
    return counter.get_total_flops() / 2


def measure(batches: Callable[[int], Iterator[tuple]], steps: int, step: Callable, device: torch.device) -> tuple[float, float]:
    """Images per second after the warm-up, all of their augmentation included, and the peak memory in bytes."""
    reset_peak(device)
    for batch in batches(WARM_UP):
        step(*batch)
    synchronise(device)
    begin, seen = time.perf_counter(), 0
    for faces, labels in batches(steps):
        step(faces, labels)
        seen += len(faces)
    synchronise(device)
    return seen / (time.perf_counter() - begin), peak_memory(device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
