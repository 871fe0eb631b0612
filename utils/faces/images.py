"""The one reader of images: what a person sees, as 8-bit RGB."""
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.runtime.errors import UserError, is_out_of_memory

# Pillow starts programs for some formats (EPS), so it is told which to look for, whatever a file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # MPO, of phones, is opened as JPEG
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif")
MOST_PIXELS, MOST_BYTES = 150_000_000, 2 * 1024**3  # of an image, and of its file
Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # Pillow warns beyond it, and read_image refuses
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged images, which are listed or refused


def read_image(path: Path) -> np.ndarray:
    """An image as it is seen: upright (EXIF), 8 bits, what is transparent laid on white.

    Returns:
        [H, W, 3] uint8 RGB.
    Raises:
        UserError: the file is missing, is no regular file, is not a whole image of one of FORMATS, or has more than
            MOST_PIXELS pixels or MOST_BYTES bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"not a regular file of at most {MOST_BYTES:,} bytes")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} are more than {MOST_PIXELS:,} pixels")
            return np.asarray(on_white(in_8_bits(ImageOps.exif_transpose(image))))
    except FileNotFoundError:
        raise UserError(f"{path}: is not there any more, or is a link to nothing; put it back, or remove the link") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: is not a readable image (none of {', '.join(FORMATS)}, or damaged); replace it by a PNG or "
                        "JPEG, or remove it") from None
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise UserError(f"{path}: is not a readable image ({reason}); replace it, or remove it") from None


def in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0 .. 65535) in 8; whatever has 8 already stays as it is."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;"):
        return image
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16")
    in_8 = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):  # the grey level that is
        in_8.putalpha(Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8)))
    return in_8


def on_white(image: Image.Image) -> Image.Image:
    """RGB, what is transparent laid on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
