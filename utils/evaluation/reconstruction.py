"""What an autoencoder loses of images."""
import math

from torch import Tensor


def reconstruction_errors(images: Tensor, decoded: Tensor) -> dict[str, float]:
    """How reconstructions differ from images, all of them together.

    Args:
        images, decoded: [N, 3, H, W] RGB in [-1, 1].
    Returns:
        psnr: dB, of the mean squared error over all pixels and channels.
        chroma_error: root mean square over pixels and channels, after each pixel's mean over RGB is subtracted; grey levels
            of 255.
        red, green, blue: mean error (reconstruction - image), grey levels; a drift of colour.
        gradient: mean absolute difference between neighbouring pixels, as a part of the images' own; below 1 is blur, which
            psnr rewards.
    """
    images, decoded = ((x.double().clamp(-1, 1) + 1) * 127.5 for x in (images, decoded))
    difference = decoded - images
    chroma = difference - difference.mean(dim=1, keepdim=True)
    red, green, blue = difference.mean(dim=(0, 2, 3)).tolist()
    return {"psnr": 10 * math.log10(255**2 / difference.square().mean().item()),
            "chroma_error": chroma.square().mean().sqrt().item(), "red": red, "green": green, "blue": blue,
            "gradient": _gradient(decoded) / _gradient(images)}


def _gradient(images: Tensor) -> float:
    return (images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()).item()
