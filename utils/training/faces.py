"""The faces that the generator is trained on: found once, cut out once, embedded once; all of it cached on disk.

<cache>/landmarks.npz              where the face of each image is
        failures.csv               identity, image, reason: images without a face
        crops-<size>-<crop>.npy    [N, size, size, 3] uint8 RGB
        contexts-<recogniser>.npy  [N, D] float32, unit norm
"""
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from utils.faces import folders as face_images
from utils.faces.detection import FaceBatches, in_processes
from utils.faces.template import ARCFACE, TEMPLATES, similarity_transform, warp, write_failures
from utils.identities import contexts
from utils.recognition.embedding import embed
from utils.runtime import files as runs
from utils.runtime.errors import UserError
from utils.runtime.ranks import Ranks

SAVE_SECONDS = 60  # between two writings of the landmarks found so far
BATCH = 16  # images detected together: a worker holds so many of them, at full size
READERS = 8  # threads that read and cut images
AHEAD = 256  # images read ahead of the writing


@dataclass(frozen=True)
class TrainingFaces:
    """The faces found in a folder.

    Attributes:
        files: [N] image files with a face.
        labels: [N] int64, the identity of each as its place in `identities`.
        identities: names.
        landmarks: [N, 5, 2] float64, px of the image; None where images are taken whole.
        digest: of the images' names and sizes and of how the faces were found.
    """

    files: list[Path]
    labels: np.ndarray
    identities: list[str]
    landmarks: np.ndarray | None
    digest: str


def prepare(root: Path | str, leave_out: Collection[str], whole: bool, minimum_face: float, size: int, margin: int,
            recogniser: torch.nn.Module, recogniser_file: Path, cache: Path,
            ranks: Ranks) -> tuple[TrainingFaces, np.ndarray, np.ndarray]:
    """The faces of a folder, their crops and their contexts (see find, crops, face_contexts), computed once by rank 0.

    Args:
        leave_out: identities not to use.
    """
    folders = {name: files for name, files in image_folders(root).items() if name not in leave_out}
    if not folders:
        raise UserError(f"training.leave_out: leaves nobody of {root}; name fewer identities")

    def everything() -> tuple[TrainingFaces, np.ndarray, np.ndarray]:
        faces = find(folders, cache, whole, minimum_face, ranks.device)
        return (faces, crops(faces, cache, size, margin),
                face_contexts(faces, cache, recogniser, recogniser_file, ranks.device))

    if ranks.is_main:
        result = everything()
        missing = sum(map(len, folders.values())) - len(result[0].files)
        print(f"{root}: {len(result[0].files)} faces of {len(result[0].identities)} people"
              + (f"; {missing} images without a face are listed in {cache / 'failures.csv'}" if missing else ""))
    ranks.barrier()
    return result if ranks.is_main else everything()


def image_folders(root: Path | str) -> dict[str, list[Path]]:
    """The images of a folder of identity folders or, where it holds images itself, each of them as its own identity.

    Raises:
        UserError: there is no such folder, it holds no image, or it holds both images and folders.
    """
    root = Path(root)
    if root.is_dir():
        visible = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in visible if entry.suffix.lower() in face_images.IMAGE_SUFFIXES)
        if names:
            if folders := sorted(entry.name for entry in visible if entry.is_dir()):
                raise UserError(f"{root}: holds images, {names[0]} for one, and folders, {folders[0]} for one; give a "
                                "folder of identity folders, or of images, each of another person")
            return {name: [root / name] for name in names}
    return face_images.identity_folders(root)


def find(folders: Mapping[str, Sequence[Path]], cache: Path, whole: bool, minimum_face: float,
         device: torch.device) -> TrainingFaces:
    """Find the face of every image, in worker processes, or read where they were found before.

    Args:
        folders: identity -> image files.
        cache: folder to keep the landmarks in; a killed search goes on from there.
        whole: do not search; images are cut-out faces already.
        minimum_face: the smallest face to look for, as a part of the image's shorter side.
    Raises:
        UserError: no image has a face.
    """
    files = [file for images in folders.values() for file in images]
    labels = np.repeat(np.arange(len(folders)), [len(images) for images in folders.values()])
    digest = runs.text_digest(f"{face_images.listing(folders)} {whole} {minimum_face}")
    landmarks, found = None, np.ones(len(files), dtype=bool)
    if not whole:
        landmarks, failures = _landmarks(files, cache / "landmarks.npz", digest, minimum_face, device)
        write_failures(cache, {(files[i].parent.name, files[i].name): reason for i, reason in failures.items()})
        found = np.isfinite(landmarks).all(axis=(1, 2))
        if not found.any():
            raise UserError(f"{os.path.commonpath(files)}: no face was found in its {len(files)} images; see "
                            f"{cache / 'failures.csv'}")
        landmarks = landmarks[found]
    kept, labels = np.unique(labels[found], return_inverse=True)
    names = list(folders)
    return TrainingFaces([file for file, has_face in zip(files, found, strict=True) if has_face], labels,
                         [names[number] for number in kept], landmarks, digest)


def _landmarks(files: Sequence[Path], cache_file: Path, digest: str, minimum_face: float,
               device: torch.device) -> tuple[np.ndarray, dict[int, str]]:
    """[N, 5, 2], NaN where there is no face, and the reason for each of these."""
    landmarks, reasons, start = np.full((len(files), 5, 2), np.nan), [], 0
    if cache_file.is_file():
        cached = runs.read_npz(cache_file, ("landmarks", "reasons", "done", "digest"))
        if cached["digest"].item() == digest:
            landmarks, reasons, start = cached["landmarks"], cached["reasons"].tolist(), cached["done"].item()
    if start == len(files):
        return landmarks, {i: reason for i, reason in enumerate(reasons) if reason}

    def save(done: int) -> None:
        runs.write_npz(cache_file, landmarks=landmarks, reasons=np.array(reasons, dtype=str), done=np.array(done),
                       digest=np.array(digest))

    batches = [files[i : i + BATCH] for i in range(start, len(files), BATCH)]
    work = FaceBatches(batches, _landmarks_alone, minimum_face, device)
    saved = time.monotonic()
    with tqdm(total=len(files), initial=start, unit="image", desc="find faces") as progress:
        for batch, results in zip(batches, in_processes(work, 0, device), strict=True):
            for result in results:
                if isinstance(result, str):
                    reasons.append(result)
                else:
                    landmarks[len(reasons)] = result
                    reasons.append("")
            if time.monotonic() - saved > SAVE_SECONDS:
                save(len(reasons))
                saved = time.monotonic()
            progress.update(len(batch))
    save(len(files))
    return landmarks, {i: reason for i, reason in enumerate(reasons) if reason}


def _landmarks_alone(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    return landmarks


# ---- what is cut out of an image -------------------------------------------------------------------------------------

def crop(image: np.ndarray, landmarks: np.ndarray | None, size: int, margin: int) -> np.ndarray:
    """The face of a training image.

    Args:
        image: [H, W, 3] uint8 RGB.
        landmarks: [5, 2], px; None: the image's middle square, whatever it shows.
        size: px.
        margin: how much more than the recognisers' canvas is shown on each side, px of its 112.
    Returns:
        [size, size, 3] uint8 RGB; where the image ends, its border is repeated.
    """
    if landmarks is None:
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side]
        return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
    canvas = face_images.SIZE + 2 * margin
    M = similarity_transform(landmarks, ARCFACE)
    enlarged = max(1, round(canvas / np.hypot(M[0, 0], M[1, 0]) / size))  # bilinear warps alias where they shrink
    template = (ARCFACE + margin + 0.5) * (enlarged * size / canvas) - 0.5
    large = cv2.warpAffine(image, similarity_transform(landmarks, template), (enlarged * size, enlarged * size),
                           flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)


def of_canvas(crops: torch.Tensor, margin: int | None) -> torch.Tensor:
    """The recognisers' canvas out of crops: [B, 3, S, S] in [-1, 1] -> [B, 3, 112, 112], differentiable.

    Args:
        margin: of the crops (see `crop`); None: the crops are whole images, which recognisers see as they are.
    """
    size, margin = crops.shape[-1], margin or 0
    canvas = face_images.SIZE + 2 * margin
    scaled = torch.nn.functional.interpolate(crops, (canvas, canvas), mode="bilinear", align_corners=False,
                                             antialias=size > canvas)
    return scaled[..., margin : canvas - margin, margin : canvas - margin]


def crops(faces: TrainingFaces, cache: Path, size: int, margin: int) -> np.ndarray:
    """All faces cut out, [N, size, size, 3] uint8 RGB, memory-mapped; made once.

    Raises:
        UserError: an image cannot be read any more.
    """
    kind = "whole" if faces.landmarks is None else f"margin{margin}"
    file = cache / f"crops-{size}-{kind}.npy"

    def cut(number: int) -> np.ndarray:
        landmarks = None if faces.landmarks is None else faces.landmarks[number]
        return crop(face_images.read_image(faces.files[number]), landmarks, size, margin)

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(faces.files), size, size, 3))
        with ThreadPoolExecutor(READERS) as threads, tqdm(total=len(array), desc="cut faces out", unit="face") as bar:
            for start in range(0, len(array), AHEAD):
                for number, face in enumerate(threads.map(cut, range(start, min(start + AHEAD, len(array)))), start):
                    array[number] = face
                    bar.update()
        array.flush()

    return cached_array(file, faces.digest, write)


def face_contexts(faces: TrainingFaces, cache: Path, recogniser: torch.nn.Module, recogniser_file: Path,
                  device: torch.device) -> np.ndarray:
    """Each face's context, [N, D] float32, unit norm: the recogniser's embedding of the face at full resolution."""
    digest = runs.text_digest(f"{faces.digest} {runs.recogniser_digest(recogniser_file)}")

    def read(number: int) -> np.ndarray:
        if faces.landmarks is None:
            return contexts.read_face(faces.files[number])
        return warp(face_images.read_image(faces.files[number]), faces.landmarks[number], TEMPLATES["arcface"])

    def write(temporary: Path) -> None:
        embeddings = contexts.normalise(embed(recogniser, range(len(faces.files)), device, "arcface", read=read))
        with open(temporary, "wb") as file:
            np.save(file, embeddings, allow_pickle=False)

    return cached_array(cache / f"contexts-{recogniser_file.stem}.npy", digest, write)


def cached_array(file: Path, digest: str, write: Callable[[Path], None]) -> np.ndarray:
    """The memory-mapped array of `file`, (re)made by `write(temporary file)` unless `digest` is what it was made of."""
    record = file.with_suffix(".json")
    if not (file.is_file() and record.is_file() and runs.read_json(record) == digest):
        record.unlink(missing_ok=True)
        with runs.atomic_write(file) as temporary:
            write(temporary)
        runs.write_json(record, digest)
    return np.load(file, mmap_mode="r", allow_pickle=False)
