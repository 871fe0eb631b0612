"""Face images on disk: folders of identity folders."""
import os
from pathlib import Path

from utils.errors import UserError

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
