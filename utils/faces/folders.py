"""Folders of images, and the images in them."""
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.runtime.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def identity_folders(root: Path | str) -> dict[str, list[Path]]:
    """The images of a folder of identity folders, `<root>/<identity>/<image>`, both levels in file-name order.

    Raises:
        UserError: there is no such folder, or it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; run the stage that writes it, or correct the setting")
    folders = {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            images = sorted(name for name in os.listdir(entry.path)
                            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
            if images:
                folders[entry.name] = [root / entry.name / name for name in images]
    if not folders:
        raise UserError(f"{root}: holds no images in identity folders (<identity>/<image>.png); give such a folder")
    return folders


def image_folders(root: Path | str) -> dict[str, list[Path]]:
    """The images of a folder of identity folders or, where it holds images itself, each of them as its own identity.

    Raises:
        UserError: there is no such folder, it holds no image, or it holds both images and folders.
    """
    root = Path(root)
    if root.is_dir():
        visible = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in visible if entry.suffix.lower() in IMAGE_SUFFIXES)
        if names:
            if folders := sorted(entry.name for entry in visible if entry.is_dir()):
                raise UserError(f"{root}: holds images, {names[0]} for one, and folders, {folders[0]} for one; give a "
                                "folder of identity folders, or of images, each of another person")
            return {name: [root / name] for name in names}
    return identity_folders(root)


def select(folders: Mapping[str, Sequence[Path]], identities: int, images_per_identity: int, minimum_images: int = 1,
           leave_out: Collection[str] = ()) -> dict[str, list[Path]]:
    """The first `identities` identities and the first `images_per_identity` images of each, in file-name order; 0: all.

    Identities in `leave_out` and those with fewer than `minimum_images` images do not count.
    """
    eligible = {identity: paths for identity, paths in folders.items()
                if identity not in leave_out and len(paths) >= minimum_images}
    return {identity: list(eligible[identity][:images_per_identity or None])
            for identity in list(eligible)[:identities or None]}


def listing(folders: Mapping[str, Sequence[Path]]) -> str:
    """SHA-256 over the images' identities, names, sizes and times of change, hex: another listing, other images."""
    digest = hashlib.sha256()
    for identity, paths in folders.items():
        for path in paths:
            status = path.stat()
            digest.update(f"{identity}/{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB. Raises UserError where the file is not a whole image."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: is not a readable image ({error}); delete it and run the stage that writes it "
                        "again") from None
