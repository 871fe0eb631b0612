"""The faces that the generator is trained on: found once, cut out once, embedded once; all of it cached on disk.

What is cached is of all faces of the folders, so that other lists of who is left or held out cost nothing.

<cache>/landmarks.npz              where the face of each image is
        failures.csv               identity, image, reason: images without a face
        crops-<size>-<crop>.npy    [N, size, size, 3] uint8 RGB
        contexts-<recogniser>.npy  [N, D] float32, unit norm
        latents-<size>-<encoder>.npy  [2, N, C, h, w] float16, of the crops and of their mirror images

Beside each lies the record of what it was made from.
"""
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from models.autoencoder import Autoencoder
from models.published import backbone_digest
from utils.faces import folders as face_folders
from utils.faces.aligned import write_list
from utils.faces.detection import DETECTOR, FaceBatches, in_processes
from utils.faces.held_out import held_out
from utils.faces.images import read_image
from utils.faces.template import ARCFACE, SIZE, TEMPLATES, similarity_transform, warp
from utils.identities.contexts import normalise as unit
from utils.recognition.augmentation import network_input
from utils.recognition.embedding import embed, read_unaligned
from utils.runtime.errors import UserError
from utils.runtime.files import atomic_write, file_digest, read_names, read_npz, text_digest, write_npz
from utils.runtime.foreign_arrays import reading
from utils.runtime.progress import StageBar
from utils.runtime.ranks import Ranks
from utils.runtime.records import Record, State, alone

MARGIN = 12  # px of 112: what crops show around the recognisers' canvas
HELD_OUT_PART, MOST_HELD_OUT = 25, 200
SAVE_SECONDS = 60  # between two writings of the landmarks found so far
BATCH = 16  # images detected together: a worker holds that many of them at full size
READERS = 8  # threads that read and cut images
AHEAD = 256  # images read ahead of the writing


@dataclass(frozen=True)
class TrainingFaces:
    """The faces found in one folder or several."""

    files: list[Path]  # [N] images with a face
    labels: np.ndarray  # [N] int64, the identity of each as its place in `identities`
    identities: list[str]  # names; of several folders `<folder>/<name>`
    landmarks: np.ndarray | None  # [N, 5, 2] float64, px of the image; None where images are taken whole
    digest: str  # of the images' names and contents and of how the faces were found
    left_out: Collection[str] = ()  # names of the identities that are not to be used

    @property
    def margin(self) -> int:
        """What crops show around the recognisers' canvas, px of 112; recognisers see whole images as they are."""
        return 0 if self.landmarks is None else MARGIN


def prepare(roots: Sequence[str], leave_out: str, whole: bool, minimum_face: float, cache: Path, ranks: Ranks) -> TrainingFaces:
    """The faces of some folders, found once, by rank 0.

    Args:
        roots: training.faces.
        leave_out: training.leave_out, a file with names of identities not to use; empty: none.
        whole: images are cut-out faces already.
        minimum_face: the smallest face to look for, as a part of the image's shorter side.
    Raises:
        UserError: there is no face, nobody is left, or a name in leave_out is unknown.
    """
    folders = face_folders.joined_folders(roots)
    left_out = read_names(leave_out, "training.leave_out", folders) if leave_out else set()
    if len(left_out) == len(folders):
        raise UserError(f"training.leave_out: leaves nobody of {','.join(roots)}; name fewer identities")

    faces = ranks.main_first(lambda: find(folders, cache, whole, minimum_face, ranks.device))
    missing = sum(map(len, folders.values())) - len(faces.files)
    ranks.print(f"{','.join(roots)}: {len(faces.files)} faces of {len(faces.identities)} people"
                + (f"; {missing} images without a face are listed in {cache / 'failures.csv'}" if missing else "")
                + (f"; {len(left_out)} people are left out" if left_out else ""))
    return replace(faces, left_out=left_out)


def hold_out(faces: TrainingFaces, names: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who is trained on and who is held out, nobody of them left out.

    Args:
        names: training.held_out, a file with names of identities; empty: one in HELD_OUT_PART, evenly spread.
    Returns:
        the rows of the faces to train on, those of the faces held out, and the numbers of the identities held out.
    Raises:
        UserError: a name is unknown, left out or without a face, or fewer than two people are left to train on.
    """
    used = np.array([number for number, name in enumerate(faces.identities) if name not in faces.left_out], dtype=np.int64)
    if names:
        listed = read_names(names, "training.held_out", [faces.identities[number] for number in used])
        chosen = np.array([number for number in used if faces.identities[number] in listed], dtype=np.int64)
        if min(len(chosen), len(used) - len(chosen)) < 2:
            raise UserError(f"{names}: holds {len(chosen)} of {len(used)} people out (training.held_out); at least two are to be "
                            "held out, and two to be left to train on")
    else:
        chosen = held_out(used, len(used), HELD_OUT_PART, MOST_HELD_OUT)
    return (np.flatnonzero(np.isin(faces.labels, used) & ~np.isin(faces.labels, chosen)),
            np.flatnonzero(np.isin(faces.labels, chosen)), chosen)


def some(rows: np.ndarray, most: int) -> np.ndarray:
    """`most` of the rows at the most, evenly spread from the first to the last."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=int)]


def decides(faces: TrainingFaces, settings: Mapping[str, Any], recogniser_file: str) -> dict[str, Any]:
    """What decides stage 0's training runs alike, for their records; `settings`: of the group `training`, by name."""
    return ({"faces": faces.digest, "contexts.recogniser": backbone_digest(recogniser_file)}
            | {f"training.{name}": settings[name] for name in ("crop", "size", "seed")}
            | {f"training.{name}": file_digest(settings[name]) if settings[name] else None for name in ("leave_out", "held_out")})


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
    names, files = list(folders), [file for images in folders.values() for file in images]
    labels = np.repeat(np.arange(len(folders)), [len(images) for images in folders.values()])
    digest = text_digest(f"{face_folders.listing(folders)} {whole} {minimum_face} {DETECTOR}")
    landmarks, found = None, np.ones(len(files), dtype=bool)
    if not whole:
        with alone(cache):
            landmarks, failures = _landmarks(files, cache / "landmarks.npz", digest, minimum_face, device)
            write_list(cache, "failures", {(names[labels[i]], files[i].name): reason for i, reason in failures.items()})
        found = np.isfinite(landmarks).all(axis=(1, 2))
        if not found.any():
            raise UserError(f"{os.path.commonpath(files)}: no face was found in its {len(files)} images; see "
                            f"{cache / 'failures.csv'}")
        landmarks = landmarks[found]
    kept, labels = np.unique(labels[found], return_inverse=True)
    return TrainingFaces([file for file, has_face in zip(files, found, strict=True) if has_face], labels,
                         [names[number] for number in kept], landmarks, digest)


def _landmarks(files: Sequence[Path], cache_file: Path, digest: str, minimum_face: float,
               device: torch.device) -> tuple[np.ndarray, dict[int, str]]:
    """[N, 5, 2], NaN where there is no face, and the reason for each of these."""
    landmarks, reasons = np.full((len(files), 5, 2), np.nan), []
    record = Record(cache_file.with_suffix(".json"), {"images": digest})
    if record.state() is State.MAKE:
        cache_file.unlink(missing_ok=True)
        record.begin()
    elif cache_file.is_file():  # it holds the first ones, or all
        found, reasons = read_npz(cache_file, ("landmarks", "reasons")).values()
        landmarks[: len(found)], reasons = found, reasons.tolist()

    def save() -> None:
        write_npz(cache_file, landmarks=landmarks[: len(reasons)], reasons=np.array(reasons, dtype=str))

    batches = [files[i : i + BATCH] for i in range(len(reasons), len(files), BATCH)]
    work = FaceBatches(batches, _landmarks_alone, minimum_face, device)
    saved = time.monotonic()
    with StageBar(total=len(files), initial=len(reasons), unit="image", desc="find faces", disable=not batches) as progress:
        for batch, results in zip(batches, in_processes(work, 0, device), strict=True):
            for result in results:
                if not isinstance(result, str):
                    landmarks[len(reasons)] = result
                reasons.append(result if isinstance(result, str) else "")
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            progress.update(len(batch))
    if batches:
        save()
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
    canvas = SIZE + 2 * margin
    M = similarity_transform(landmarks, ARCFACE)
    enlarged = max(1, round(canvas / np.hypot(M[0, 0], M[1, 0]) / size))  # bilinear warps alias where they shrink
    template = (ARCFACE + margin + 0.5) * (enlarged * size / canvas) - 0.5
    large = cv2.warpAffine(image, similarity_transform(landmarks, template), (enlarged * size, enlarged * size),
                           flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)


def part_outside(landmarks: np.ndarray, height: int, width: int, margin: int) -> float:
    """The part of a crop that lies outside its image, where the border is repeated: 0 is a whole head, unless it is cut off.

    Args:
        landmarks: [5, 2], px of the image of that height and width.
        margin: as in `crop`.
    """
    canvas = SIZE + 2 * margin
    M = similarity_transform(landmarks, ARCFACE + margin)
    return 1 - float(cv2.warpAffine(np.ones((height, width), np.float32), M, (canvas, canvas)).mean())


def of_canvas(crops: torch.Tensor, margin: int) -> torch.Tensor:
    """The recognisers' canvas out of crops: [B, 3, S, S] in [-1, 1] -> [B, 3, 112, 112], differentiable.

    Args:
        margin: of the crops (see `crop`).
    """
    size, canvas = crops.shape[-1], SIZE + 2 * margin
    scaled = torch.nn.functional.interpolate(crops, (canvas, canvas), mode="bilinear", align_corners=False,
                                             antialias=size > canvas)
    return scaled[..., margin : canvas - margin, margin : canvas - margin]


def crops(faces: TrainingFaces, cache: Path, size: int, margin: int) -> np.ndarray:
    """All faces cut out, [N, size, size, 3] uint8 RGB, memory-mapped; made once.

    Raises:
        UserError: an image cannot be read any more.
    """
    kind = "whole" if faces.landmarks is None else f"margin{margin}"

    def cut(number: int) -> np.ndarray:
        landmarks = None if faces.landmarks is None else faces.landmarks[number]
        return crop(read_image(faces.files[number]), landmarks, size, margin)

    def write(temporary: Path) -> None:
        array = open_array(temporary, np.uint8, (len(faces.files), size, size, 3))
        with ThreadPoolExecutor(READERS) as threads, StageBar(total=len(array), desc="cut faces out", unit="face") as bar:
            for start in range(0, len(array), AHEAD):
                for number, face in enumerate(threads.map(cut, range(start, min(start + AHEAD, len(array)))), start):
                    array[number] = face
                    bar.update()
        array.flush()

    return cached_array(cache / f"crops-{size}-{kind}.npy", {"faces": faces.digest}, write)


def face_contexts(faces: TrainingFaces, cache: Path, recogniser: torch.nn.Module, recogniser_file: Path,
                  device: torch.device) -> np.ndarray:
    """Each face's context, [N, D] float32, unit norm: the recogniser's embedding of the face at full resolution."""
    def read(number: int) -> np.ndarray:
        if faces.landmarks is None:
            return read_unaligned(faces.files[number])
        return warp(read_image(faces.files[number]), faces.landmarks[number], TEMPLATES["arcface"])

    def write(temporary: Path) -> None:
        embeddings = unit(embed(recogniser, range(len(faces.files)), device, read=read))
        with open(temporary, "wb") as file:
            np.save(file, embeddings, allow_pickle=False)

    made_from = {"faces": faces.digest, "recogniser": backbone_digest(recogniser_file)}
    return cached_array(cache / f"contexts-{recogniser_file.stem}.npy", made_from, write)


def face_latents(faces: TrainingFaces, crops: np.ndarray, cache: Path, autoencoder: Autoencoder, encoder_file: Path,
                 device: torch.device) -> np.ndarray:
    """The latents of the crops and of their mirror images, [2, N, C, h, w] float16, memory-mapped; made once."""
    encoder, size = file_digest(encoder_file), crops.shape[1] // autoencoder.factor

    @torch.inference_mode()
    def write(temporary: Path) -> None:
        shape = (2, len(crops), autoencoder.vq.quant_conv.out_channels, size, size)
        array = open_array(temporary, np.float16, shape)
        for start in tqdm(range(0, len(crops), 64), desc="encode", unit="batch"):
            images = network_input(np.array(crops[start : start + 64]), device)
            for side, shown in enumerate((images, images.flip(3))):
                array[side, start : start + 64] = autoencoder.encode(shown).float().cpu().numpy()
        array.flush()

    made_from = {"faces": faces.digest, "encoder": encoder, "crops": list(crops.shape)}
    return cached_array(cache / f"latents-{crops.shape[1]}-{encoder[:8]}.npy", made_from, write)


def cached_array(file: Path, made_from: Mapping[str, Any], write: Callable[[Path], None]) -> np.ndarray:
    """The memory-mapped array of `file`, made by `write(temporary file)` unless it was made from the same before."""
    with Record(file.with_suffix(".json"), made_from, target=file).making() as is_new:
        if is_new:
            with atomic_write(file) as temporary:
                write(temporary)
        with reading(file, "a whole array", "delete it, and run the same command again"):
            return np.load(file, mmap_mode="r", allow_pickle=False)


def open_array(file: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new memory-mapped array. Its space is taken beforehand: a full disk is an OSError here, and no crash later."""
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(file, "rb+") as opened:
            os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
    return array
