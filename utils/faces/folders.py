"""Face images on disk: folders of identity folders, and the packed array that training reads."""
import hashlib
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, read_npz, write_npz

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIZE = 112  # px, height and width of an aligned face
READERS = 8  # threads that decode images; decoding releases the interpreter
BLOCK = 1024  # images decoded ahead of the writing, at the most
BATCHES_AHEAD = 4  # batches read before they are asked for


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


def select(folders: Mapping[str, Sequence[Path]], identities: int, images_per_identity: int, minimum_images: int = 1,
           leave_out: Collection[str] = ()) -> dict[str, list[Path]]:
    """The first so many identities and the first so many images of each, in file-name order; 0: all.

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


# ---- packed faces ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PackedFaces:
    """All faces of a training set as one array on disk.

    Attributes:
        images: [N, 112, 112, 3] uint8 RGB, memory-mapped, identity by identity.
        labels: [N] int64, the identity of each image as its place in `identities`.
        identities: [C] names.
        paths: [N] `<identity>/<image>`.
        listing: what `listing` says of the images that were packed.
    """

    images: np.ndarray
    labels: np.ndarray
    identities: np.ndarray
    paths: np.ndarray
    listing: str


def pack(folders: Mapping[str, Sequence[Path]], file: Path) -> PackedFaces:
    """Pack the images of `folders` into `file` (.npy, its index beside it), or load them where that is done already.

    Args:
        folders: identity -> its images, all 112 x 112 (identity_folders, select).
        file: the array; packed anew where the images are others than those it was made of.
    Raises:
        UserError: an image cannot be read or is not 112 x 112.
    """
    digest = listing(folders)
    index_file = file.with_suffix(".index.npz")
    if file.is_file() and index_file.is_file() and (packed := load_packed(file)).listing == digest:
        return packed
    images = [path for paths in folders.values() for path in paths]
    # Without its index an array is not packed: a kill from here on leaves no array with another's index.
    index_file.unlink(missing_ok=True)
    with atomic_write(file) as temporary, open(temporary, "wb") as array, ThreadPoolExecutor(READERS) as pool:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), SIZE, SIZE, 3)}
        np.lib.format.write_array_header_1_0(array, header)
        with tqdm(total=len(images), desc="packing", unit="image") as bar:
            for start in range(0, len(images), BLOCK):
                for image in pool.map(_read_face, images[start:start + BLOCK]):
                    array.write(image.tobytes())
                    bar.update()
    write_npz(index_file, labels=np.repeat(np.arange(len(folders)), [len(paths) for paths in folders.values()]),
              identities=np.array(list(folders)), listing=np.array(digest),
              paths=np.array([f"{identity}/{path.name}" for identity, paths in folders.items() for path in paths]))
    return load_packed(file)


def load_packed(file: Path) -> PackedFaces:
    """Raises UserError where the array or its index is absent, damaged, or the two do not belong together."""
    mend = "delete both; train_fr.py packs the faces again"
    index_file = file.with_suffix(".index.npz")
    index = read_npz(index_file, ["labels", "identities", "paths", "listing"])
    labels, identities = index["labels"], index["identities"]
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a readable array ({error}); {mend}") from None
    if images.shape != (len(labels), SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise UserError(f"{file}: holds {images.dtype} {images.shape}, not uint8 of {len(labels)} faces; {mend}")
    if labels.min() < 0 or labels.max() >= len(identities):
        raise UserError(f"{index_file}: has labels {labels.min()} to {labels.max()}, but {len(identities)} identities, "
                        f"numbered from 0; {mend}")
    empty = np.flatnonzero(np.bincount(labels, minlength=len(identities)) == 0)
    if empty.size:
        raise UserError(f"{index_file}: has no image of identity {identities[empty[0]]}; {mend}")
    return PackedFaces(images, labels, identities, index["paths"], index["listing"].item())


def _read_face(path: Path) -> np.ndarray:
    image = read_image(path)
    if image.shape != (SIZE, SIZE, 3):
        raise UserError(f"{path}: is {image.shape[1]} x {image.shape[0]}, not {SIZE} x {SIZE}; run align.py and give "
                        "the folder it writes")
    return image


class FaceReader:
    """Batches of packed faces on a device: from its own memory where all faces fit there, else read ahead by threads.

    Args:
        images: [N, 112, 112, 3] uint8, memory-mapped.
        device: a GPU keeps all faces if they take at most half of its free memory.
    """

    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        self.images, self.device, self.resident = images, device, None
        if device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(images), BLOCK):
                self.resident[start:start + BLOCK] = torch.from_numpy(images[start:start + BLOCK].copy())

    def batches(self, order: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """For each [B] row numbers of `order` their faces: [B, 3, 112, 112] uint8, channels last."""
        if self.resident is not None:
            for rows in order:
                rows_on_device = torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)
                yield self.resident[rows_on_device].permute(0, 3, 1, 2)
            return
        waiting = deque()
        with ThreadPoolExecutor(READERS) as pool:
            for rows in order:
                waiting.append(pool.submit(self._read, rows))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._to_device(waiting.popleft().result())
            while waiting:
                yield self._to_device(waiting.popleft().result())

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        faces = torch.from_numpy(np.take(self.images, rows, axis=0))
        return faces.pin_memory() if self.device.type == "cuda" else faces

    def _to_device(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
