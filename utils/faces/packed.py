"""All faces of a training set as one array on disk, and batches of them on a device."""
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.faces.aligned import read_aligned
from utils.faces.template import SIZE
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, read_npz, require_file, write_npz
from utils.runtime.progress import StageBar, announce
from utils.runtime.records import Record

READERS = 8  # threads that decode images; decoding releases the interpreter
BLOCK = 1024  # images decoded ahead of the writing, at the most
BATCHES_AHEAD = 4  # batches read before they are asked for


@dataclass(frozen=True)
class PackedFaces:
    """All faces of a training set as one array on disk."""

    images: np.ndarray  # [N, 112, 112, 3] uint8 RGB, memory-mapped, identity by identity
    labels: np.ndarray  # [N] int64, the identity of each image as its place in `identities`
    identities: np.ndarray  # [C] names
    paths: np.ndarray  # [N] `<identity>/<image>`


def pack(folders: Mapping[str, Sequence[Path]], file: Path, digest: str) -> None:
    """Pack the images of `folders` into `file` (.npy, its index beside it), unless that is done already.

    Args:
        folders: identity -> its images, all 112 x 112 (identity_folders, select).
        digest: of the images (listing).
    Raises:
        UserError: an image cannot be read or is not 112 x 112.
    """
    index_file = file.with_suffix(".index.npz")
    with Record(file.with_suffix(".json"), {"images": digest}, target=file).making(index_file) as is_new:
        if not is_new:
            return
        images = [path for paths in folders.values() for path in paths]
        announce("packing", len(images), "faces", file, 3 * SIZE**2, files=1)
        write_npz(index_file,
                  labels=np.repeat(np.arange(len(folders)), [len(paths) for paths in folders.values()]),
                  identities=np.array(list(folders)),
                  paths=np.array([f"{identity}/{path.name}" for identity, paths in folders.items() for path in paths]))
        with atomic_write(file) as temporary, open(temporary, "wb") as array, ThreadPoolExecutor(READERS) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), SIZE, SIZE, 3)}
            np.lib.format.write_array_header_1_0(array, header)
            with StageBar(total=len(images), desc="packing", unit="image") as bar:
                for start in range(0, len(images), BLOCK):
                    for image in pool.map(read_aligned, images[start : start + BLOCK]):
                        array.write(image.tobytes())
                        bar.update()


def load_packed(file: Path) -> PackedFaces:
    """Raises UserError where the array or its index is absent, damaged, or the two do not belong together."""
    fix = "delete both; train_fr.py packs the faces again"
    index_file = file.with_suffix(".index.npz")
    index = read_npz(require_file(index_file, "the index of packed faces", fix), ["labels", "identities", "paths"])
    labels, identities = index["labels"], index["identities"]
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: is not a readable array ({error}); {fix}") from None
    if images.shape != (len(labels), SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise UserError(f"{file}: holds {images.dtype} {images.shape}, not uint8 of {len(labels)} faces; {fix}")
    if not np.array_equal(np.unique(labels), np.arange(len(identities))):
        raise UserError(f"{index_file}: its labels are not those of its {len(identities)} identities; {fix}")
    return PackedFaces(images, labels, identities, index["paths"])


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
