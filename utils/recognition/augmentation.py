"""Augmentation of training faces on the device: a flip, or a flip and then RandAugment(4, 16).

What an image gets is a pure function of (seed, epoch, image), so it does not depend on batch, rank or restarts.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as in the paper's training: 13 operations of torchvision's, four of them
one after another, each at a magnitude drawn anew from the bins 1..16 of 31. Images that get the same operation at the same
magnitude are one call.
"""
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

from utils.diffusion.noise import WORD, philox

ROUNDS, HIGHEST_BIN, BINS = 4, 16, 31

# Name -> (the parameter at the highest bin, by image width; whether it has a sign; the operation on [B, 3, H, W] uint8).
# Where two versions exist, the one that does not read values of the device.
OPERATIONS: dict[str, tuple[Callable[[int], float], bool, Callable[[Tensor, float], Tensor]]] = {
    "Identity": (lambda width: 0.0, False, lambda images, value: images),
    "ShearX": (lambda width: 0.3, True, lambda images, value: TF.affine(
        images, 0.0, [0, 0], 1.0, [math.degrees(math.atan(value)), 0.0], center=[0, 0])),
    "TranslateX": (lambda width: 150 / 331 * width, True, lambda images, value: TF.affine(
        images, 0.0, [int(value), 0], 1.0, [0.0, 0.0])),
    "Rotate": (lambda width: 30.0, True, TF.rotate),
    "Brightness": (lambda width: 0.9, True, lambda images, value: TF.adjust_brightness(images, 1 + value)),
    "Color": (lambda width: 0.9, True, lambda images, value: TF.adjust_saturation(images, 1 + value)),
    "Contrast": (lambda width: 0.9, True, lambda images, value: TF.adjust_contrast(images, 1 + value)),
    "Sharpness": (lambda width: 0.9, True, lambda images, value: TF.adjust_sharpness(images, 1 + value)),
    "Posterize": (lambda width: 4.0, False, lambda images, value: TF.posterize(images, 8 - round(value))),
    "Solarize": (lambda width: 255.0, False, lambda images, value: TF.solarize(images, 255.0 - value)),
    "AutoContrast": (lambda width: 0.0, False, lambda images, value: TF2.autocontrast(images)),
    "Equalize": (lambda width: 0.0, False, lambda images, value: TF2.equalize(images)),
    "Grayscale": (lambda width: 0.0, False, lambda images, value: TF.rgb_to_grayscale(images, 3)),
}


def normalise(images: Tensor) -> Tensor:
    """Grey levels 0..255 of any type -> float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    return images.float() / 127.5 - 1


def network_input(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Images [B, H, W, 3] uint8 RGB -> [B, 3, H, W] float32 in [-1, 1] on a device, channels last."""
    shown = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return normalise(shown).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, image_numbers: Tensor, seed: int, epoch: int, kind: str) -> Tensor:
    """Augment a batch.

    Args:
        images: [B, 3, H, W] uint8, on any device.
        image_numbers: [B] int64 on the CPU: each image's place in the training set.
        seed, epoch: with the image's number they decide what it gets.
        kind: `none`, `flip` or `randaugment`.
    Returns:
        [B, 3, H, W] uint8.
    """
    if kind == "none":
        return images
    words = draw(image_numbers, seed, epoch)
    flipped = (words[:, 0] & 1).bool().to(images.device, non_blocking=True)
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    if kind == "flip":
        return images
    for operation, magnitude, sign in words[:, 1 : 1 + 3 * ROUNDS].T.split(3):
        images = apply(images, operation % len(OPERATIONS), 1 + magnitude % HIGHEST_BIN, (sign & 1).bool())
    return images


def draw(image_numbers: Tensor, seed: int, epoch: int) -> Tensor:
    """16 random 32-bit words for each image: [B] int64 -> [B, 16] int64. Counter-based (utils.diffusion.noise.philox)."""
    blocks = torch.arange(4)[None]
    counter = (blocks, torch.full_like(blocks, epoch), torch.zeros_like(blocks), image_numbers[:, None])
    return torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1).flatten(1)


def apply(images: Tensor, operation: Tensor, magnitude: Tensor, negative: Tensor) -> Tensor:
    """One operation on each image.

    Args:
        images: [B, 3, H, W] uint8, on any device.
        operation: [B] int64 on the CPU: which of OPERATIONS.
        magnitude: [B] int64 on the CPU: which of the bins 0..30.
        negative: [B] bool on the CPU: the sign, for the operations that have one.
    Returns:
        [B, 3, H, W] uint8, a new tensor.
    """
    result, operations = images.clone(), list(OPERATIONS.values())
    groups: dict[tuple[int, float], list[int]] = {}
    for image, (number, bin, minus) in enumerate(zip(operation.tolist(), magnitude.tolist(), negative.tolist(), strict=True)):
        highest, has_sign, _ = operations[number]
        value = torch.linspace(0, highest(images.shape[-1]), BINS)[bin].item()
        groups.setdefault((number, -value if has_sign and minus else value), []).append(image)
    for (number, value), chosen in groups.items():
        where = torch.tensor(chosen).to(images.device, non_blocking=True)
        result[where] = operations[number][2](images[where], value)
    return result
