"""Augmentation of training faces on the device: a flip, or a flip and then RandAugment(4, 16).

What an image gets is a pure function of (seed, epoch, image), so it does not depend on batch, rank or restarts. The
draws are made on the CPU, where they are needed to group the images by operation without waiting for the device; the
operations work on all images of a group at once, each image with its own parameter.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as in the paper's training: 13 operations, four of them one after
another, each at a magnitude drawn anew from the bins 1..16 of 31. The pixels equal those of torchvision's functions
(transforms.functional; AutoContrast: transforms.v2.functional).
"""
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from utils.diffusion.noise import WORD, philox

OPERATIONS = ("Identity", "ShearX", "TranslateX", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
              "Posterize", "Solarize", "AutoContrast", "Equalize", "Grayscale")
ROUNDS = 4
HIGHEST_BIN, BINS = 16, 31


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Grey levels 0..255 of any type -> float32 in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    return images.float() / 127.5 - 1


def augment(images: torch.Tensor, image_numbers: torch.Tensor, seed: int, epoch: int, kind: str) -> torch.Tensor:
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
    for operation, magnitude, sign in words[:, 1:1 + 3 * ROUNDS].T.split(3):
        images = apply(images, operation % len(OPERATIONS), 1 + magnitude % HIGHEST_BIN, (sign & 1).bool())
    return images


def draw(image_numbers: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """16 random 32-bit words for each image: [B] int64 -> [B, 16] int64. Counter-based (utils.diffusion.noise.philox)."""
    blocks = torch.arange(4)[None]
    counter = (blocks, torch.full_like(blocks, epoch), torch.zeros_like(blocks), image_numbers[:, None])
    return torch.stack(philox(counter, (seed & WORD, seed >> 32 & WORD)), dim=-1).flatten(1)


def apply(images: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor,
          negative: torch.Tensor) -> torch.Tensor:
    """One operation on each image.

    Args:
        images: [B, 3, H, W] uint8, on any device.
        operation: [B] int64 on the CPU: which of OPERATIONS.
        magnitude: [B] int64 on the CPU: which of the bins 0..30.
        negative: [B] bool on the CPU: the sign, for the operations that have one.
    Returns:
        [B, 3, H, W] uint8, a new tensor.
    """
    result = images.clone()
    for number, name in enumerate(OPERATIONS[1:], start=1):
        chosen = (operation == number).nonzero()[:, 0]
        if len(chosen):
            values = parameter(name, magnitude[chosen], negative[chosen], width=images.shape[-1])
            where = chosen.to(images.device, non_blocking=True)
            result[where] = FUNCTIONS[name](images[where], values)
    return result


def parameter(name: str, magnitude: torch.Tensor, negative: torch.Tensor, width: int) -> torch.Tensor:
    """What the bins [B] mean to an operation: [B] float64 on the CPU, with torchvision's RandAugment's values."""
    highest = {"ShearX": 0.3, "TranslateX": 150 / 331 * width, "Rotate": 30.0, "Brightness": 0.9, "Color": 0.9,
               "Contrast": 0.9, "Sharpness": 0.9}
    if name in highest:
        signed = torch.linspace(0, highest[name], BINS)[magnitude].double() * torch.where(negative, -1, 1)
        if name in ("ShearX", "Rotate"):
            return signed
        return signed.trunc() if name == "TranslateX" else 1 + signed
    if name == "Posterize":
        return 8 - (torch.arange(BINS) / ((BINS - 1) / 4)).round()[magnitude].double()
    if name == "Solarize":
        return torch.linspace(255, 0, BINS)[magnitude].double()
    return torch.zeros(len(magnitude), dtype=torch.float64)


# ---- the operations: images [B, 3, H, W] uint8 and parameters [B] float64 on the CPU -> [B, 3, H, W] uint8 -----------

def shear_x(images: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Pixel (x, y) from (x + slope * y, y), y counted from the upper edge."""
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    return _warp(images, torch.stack([one, slope, slope * images.shape[-2] / 2, zero, one, zero], dim=1))


def translate_x(images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Pixel (x, y) from (x - pixels, y)."""
    zero, one = torch.zeros_like(pixels), torch.ones_like(pixels)
    return _warp(images, torch.stack([one, zero, -pixels, zero, one, zero], dim=1))


def rotate(images: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    """Anticlockwise about the centre."""
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    return _warp(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1))


def _warp(images: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The nearest pixel to theta (x, y, 1), black outside; theta [B, 6] in px, the origin at the image's centre."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device),
                          torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device), indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, height * width, 3)
    theta = theta.float().view(-1, 2, 3).transpose(1, 2) / torch.tensor([width / 2, height / 2])
    theta = theta.to(images.device, non_blocking=True)
    grid = (points.expand(len(images), -1, -1) @ theta).view(-1, height, width, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).byte()


def brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, torch.zeros_like(images), factor)


def color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images), factor)


def contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(images, _grey(images).float().mean(dim=(1, 2, 3), keepdim=True), factor)


def sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels stay."""
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = F.conv2d(smooth, kernel, groups=3).round()
    return _blend(images, smooth, factor)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """factor * images + (1 - factor) * other, cut to 0..255."""
    factor, rest = (x.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1) for x in (factor, 1 - factor))
    return (images * factor + other * rest).clamp(0, 255).byte()


def _grey(images: torch.Tensor) -> torch.Tensor:
    return TF.rgb_to_grayscale(images, num_output_channels=1)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Keep the highest bits."""
    mask = (256 - 2 ** (8 - bits)).byte().to(images.device, non_blocking=True)
    return images & mask.view(-1, 1, 1, 1)


def solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Invert what is at least as bright as the threshold."""
    threshold = threshold.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(images >= threshold, 255 - images, images)


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ShearX": shear_x, "TranslateX": translate_x, "Rotate": rotate, "Brightness": brightness, "Color": color,
    "Contrast": contrast, "Sharpness": sharpness, "Posterize": posterize, "Solarize": solarize,
    # Torchvision's own treat each image of a batch by itself.
    "AutoContrast": lambda images, _: TF.autocontrast(images),
    "Equalize": lambda images, _: TF.equalize(images),
    "Grayscale": lambda images, _: TF.rgb_to_grayscale(images, num_output_channels=3),
}
