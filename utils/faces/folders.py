"""Folders of images: which there are, and what is in them."""
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from utils.faces.images import IMAGE_SUFFIXES, MOST_BYTES
from utils.runtime.errors import UserError
from utils.runtime.files import file_digest

READERS = 8  # threads


def visible(folder: Path | str | os.DirEntry) -> list[os.DirEntry]:
    """What is in a folder, in file-name order, without what is hidden."""
    return sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)


def is_image(entry: os.DirEntry) -> bool:
    """Whether it is called one."""
    return entry.name.lower().endswith(IMAGE_SUFFIXES)


def identity_folders(root: Path | str) -> dict[str, list[Path]]:
    """The images of a folder of identity folders, `<root>/<identity>/<image>`, both levels in file-name order.

    Raises:
        UserError: there is no such folder, it holds no image, or a folder in it has its images a level deeper.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; run the stage that writes it, or correct the setting")
    folders = {}
    for entry in visible(root):
        if entry.is_dir():
            images = [inner.name for inner in visible(entry.path) if is_image(inner)]
            if images:
                folders[entry.name] = [root / entry.name / name for name in images]
            elif deeper := next((inner for inner in visible(entry.path) if inner.is_dir() and any(map(is_image, visible(inner)))),
                                None):
                raise UserError(f"{root / entry.name}: holds folders of images ({deeper.name}) instead of images; give "
                                f"a folder whose folders are one person each, such as {root / entry.name} itself")
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


def joined_folders(roots: Sequence[Path | str]) -> dict[str, list[Path]]:
    """image_folders of one folder; of several, all of them, identities called `<folder>/<identity>`.

    Folders of one name are told apart by as much of their paths as it takes, so two identities never share a name.

    Raises:
        UserError: as image_folders; no folder is given, or one of them twice.
    """
    if len(roots) == 1:
        return image_folders(roots[0])
    parts = [Path(root).resolve().parts for root in roots]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return {f"{name}/{identity}": files for name, root in zip(names, roots, strict=True)
                    for identity, files in image_folders(root).items()}
    twice = [root for root, part in zip(roots, parts, strict=True) if parts.count(part) > 1]
    raise UserError(f"{twice[0]}: is given twice; name each folder of faces once" if twice else
                    "training.faces: is empty; give a folder of faces, or several, separated by commas")


def select(folders: Mapping[str, Sequence[Path]], identities: int, images_per_identity: int, minimum_images: int = 1,
           leave_out: Collection[str] = ()) -> dict[str, list[Path]]:
    """The first `identities` identities and the first `images_per_identity` images of each, in file-name order; 0: all.

    Identities in `leave_out` and those with fewer than `minimum_images` images do not count.
    """
    eligible = {identity: paths for identity, paths in folders.items()
                if identity not in leave_out and len(paths) >= minimum_images}
    return {identity: list(eligible[identity][:images_per_identity or None])
            for identity in list(eligible)[:identities or None]}


def other_files(root: Path | str) -> list[Path]:
    """The visible files in a folder of identity folders that are no images by their names, for their user to know of."""
    return [Path(entry.path) for folder in visible(root) if folder.is_dir() for entry in visible(folder)
            if not entry.is_dir() and not is_image(entry)]


def misplaced_images(root: Path | str) -> list[Path]:
    """The images that lie beside the identity folders, or in folders inside of them, for their user to know of."""
    entries = visible(root)
    inside = [entry for folder in entries if folder.is_dir() for entry in visible(folder)]
    deeper = [entry for folder in inside if folder.is_dir() for entry in visible(folder)]
    return [Path(entry.path) for entry in (*entries, *deeper) if is_image(entry) and not entry.is_dir()]


def listing(folders: Mapping[str, Sequence[Path]]) -> str:
    """SHA-256 over the images' identities, names and contents, hex: another listing, other images."""
    names = [f"{identity}/{path.name}" for identity, paths in folders.items() for path in paths]
    digest = hashlib.sha256()
    for name, content in zip(names, contents([path for paths in folders.values() for path in paths]), strict=True):
        digest.update(f"{name} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def contents(files: Sequence[Path]) -> Iterator[str]:
    """The SHA-256 of each file's bytes, hex, or `no file` where there is nothing to read, or too much for an image."""
    def content(file: Path) -> str:
        return file_digest(file) if file.is_file() and file.stat().st_size <= MOST_BYTES else "no file"

    with ThreadPoolExecutor(READERS) as threads:
        yield from tqdm(threads.map(content, files), total=len(files), desc="check images", unit="image", delay=1, leave=False)
