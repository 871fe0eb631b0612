"""Face detection: MTCNN, the largest plausible face of an image, and batches of images in worker processes."""
import multiprocessing
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from facenet_pytorch import MTCNN
from torch.utils.data import DataLoader, Dataset

from utils.faces.images import read_image
from utils.faces.template import ARCFACE, SIZE, LandmarkError, similarity_transform
from utils.runtime.errors import STOPS, UserError, hold_stops, worker_error
from utils.runtime.ranks import die_with_parent

DETECTOR = "MTCNN"  # as records name it; earlier versions located its landmarks once more
PIXELS_AT_ONCE = 50_000_000  # a process holds images of little more than these, 3 bytes each
GPU_PROCESSES = 4  # at most by default: each holds a CUDA context of its own
GPU_IMAGES = 1000  # of each by default: what it imports at first took up to 12 s beside an H200, in which one aligned 900

# How far landmarks may be from the template's shape: px of 112, root mean square. LFW's farthest is 11.1, a head turned
# by 75 degrees is at 13.7, and two swapped corners of the mouth are at 16.9.
MAX_RESIDUAL = 14.0
# How far outside the detector's box landmarks may lie, as a part of the box; 0.13 on LFW.
BOX_MARGIN = 0.25

# What the detector looks at: see Canvas.
CANVAS_SIDE = 256  # px
CANVAS_PADDING = 48  # px
SMALLEST_SIDE = 16  # px; nothing smaller can show a face
THINNEST = 16  # sides of an image, one by the other; a strip of 16 px would be enlarged to gigabytes


@dataclass(frozen=True)
class Face:
    """A detected face: `box` [2, 2], its corners of least and largest x and y, and `landmarks` [5, 2]; px."""

    box: np.ndarray
    landmarks: np.ndarray


class Canvas:
    """What the detector sees of an image, and the way back.

    Images are brought to a shorter side near 256 px by a whole factor: 64 px is enlarged x 4, 128 px x 2, 250 px stays,
    1000 px is shrunk to a quarter. Small images are mostly crops whose face touches the border, where MTCNN finds
    it badly: what is enlarged is also padded, by replication.
    """

    def __init__(self, height: int, width: int) -> None:
        shorter = min(height, width)
        enlarge = max(1, round(CANVAS_SIDE / shorter))
        shrink = max(1, round(shorter / CANVAS_SIDE))
        self.size = (width * enlarge // shrink, height * enlarge // shrink)
        self.scale = np.array(self.size) / (width, height)
        self.padding = CANVAS_PADDING if enlarge > 1 else 0
        self.shorter_side = min(self.size)

    def draw(self, image: np.ndarray) -> np.ndarray:
        shrinks = self.scale[0] < 1
        canvas = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return cv2.copyMakeBorder(canvas, *[self.padding] * 4, cv2.BORDER_REPLICATE)

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the canvas, px, in px of the image: pixel centres go to pixel centres."""
        return (points - self.padding + 0.5) / self.scale - 0.5


class FaceDetector:
    """MTCNN (Zhang et al. 2016) of facenet-pytorch, with its own thresholds.

    Args:
        minimum_face: the smallest face to look for, as a part of the image's shorter side; in (0, 1).
    """

    def __init__(self, minimum_face: float, device: torch.device | str = "cpu") -> None:
        self.minimum_face = minimum_face
        self.mtcnn = MTCNN(device=torch.device(device))

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """The faces of each image ([H, W, 3] uint8 RGB, of any sizes; those of one size are one batch)."""
        faces: list[list[Face]] = [[] for _ in images]
        by_size = defaultdict(list)
        for index, image in enumerate(images):
            if min(image.shape[:2]) >= SMALLEST_SIDE:
                by_size[image.shape[:2]].append(index)
        for size, indices in by_size.items():
            canvas = Canvas(*size)
            self.mtcnn.min_face_size = self.minimum_face * canvas.shorter_side
            batch = np.stack([canvas.draw(images[index]) for index in indices])
            # MTCNN.forward fails under numpy >= 1.24 where images differ in their number of faces; detect does not.
            boxes, _, points = self.mtcnn.detect(batch, landmarks=True)
            for index, boxes_of_image, points_of_image in zip(indices, boxes, points, strict=True):
                if boxes_of_image is not None:
                    corners = canvas.to_image(np.asarray(boxes_of_image, dtype=np.float64).reshape(-1, 2, 2))
                    landmarks = canvas.to_image(np.asarray(points_of_image, dtype=np.float64))
                    faces[index] = [Face(*face) for face in zip(corners, landmarks, strict=True)]
        return faces


def choose_landmarks(faces: Sequence[Face], height: int, width: int) -> np.ndarray:
    """The landmarks [5, 2] of the largest plausible face of an image.

    Large is what shows of a face's box: somebody at the border, cut in half, is not who the picture is of. Nor, of two
    people of about one size, is the one aside: twice the squared distance from the middle counts against a face.

    Raises:
        LandmarkError: there is no face, or none of them is plausible; the reason is that of the largest.
    """
    if not faces:
        raise LandmarkError("no face found")
    refused = []
    for face in sorted(faces, key=lambda face: _prominence(face, height, width), reverse=True):
        try:
            check_plausible(face, height, width)
            return face.landmarks
        except LandmarkError as error:
            refused.append(str(error))
    raise LandmarkError(refused[0])


def check_plausible(face: Face, height: int, width: int) -> None:
    """Refuse landmarks that cannot be a face's in an image of this height and width, px.

    Raises:
        LandmarkError: they are not finite, degenerate, mirrored, far outside the face's box, outside the image, or in
            an arrangement that no face takes.
    """
    landmarks = face.landmarks
    M = similarity_transform(landmarks, ARCFACE)
    lowest, highest = face.box
    margin = BOX_MARGIN * (highest - lowest)
    if (landmarks < lowest - margin).any() or (landmarks > highest + margin).any():
        raise LandmarkError("landmarks lie far outside the face's box")
    if (landmarks < -0.5).any() or (landmarks > (width - 0.5, height - 0.5)).any():
        raise LandmarkError("landmarks lie outside the image")
    residual = np.sqrt(((landmarks @ M[:, :2].T + M[:, 2] - ARCFACE) ** 2).sum(axis=1).mean())
    if residual > MAX_RESIDUAL:
        raise LandmarkError(f"landmarks are not arranged as a face's ({residual:.1f} px of {SIZE} from the template)")


def _prominence(face: Face, height: int, width: int) -> float:
    lowest, highest = face.box
    shown = np.minimum(highest, (width - 0.5, height - 0.5)) - np.maximum(lowest, -0.5)
    aside = face.box.mean(axis=0) - ((width - 1) / 2, (height - 1) / 2)
    return float(np.clip(shown, 0, None).prod() - 2 * (aside**2).sum())


# ---- in worker processes ---------------------------------------------------------------------------------------------

@dataclass
class FaceBatches(Dataset):
    """Batches of images, detected where they are asked for.

    Item i is, for each image of batch i, what `of_face` makes of it, or the reason (str) why there is no face.
    """

    batches: Sequence[Sequence[Path]]  # image files
    of_face: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (image [H, W, 3] uint8 RGB, landmarks [5, 2]) -> an array
    minimum_face: float  # the smallest face to look for, as a part of the image's shorter side
    device: torch.device

    @cached_property
    def detector(self) -> FaceDetector:
        return FaceDetector(self.minimum_face, self.device)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[np.ndarray | str]:
        results, waiting, pixels = [], [], 0
        for path in self.batches[number]:
            try:
                waiting.append(read_image(path))
                if max(waiting[-1].shape[:2]) > THINNEST * min(waiting[-1].shape[:2]):
                    waiting[-1] = "is too thin to show a face"
                    continue
                pixels += waiting[-1].shape[0] * waiting[-1].shape[1]
            except UserError as error:
                waiting.append(str(error).removeprefix(f"{path}: "))  # failures.csv names the image already
            if pixels > PIXELS_AT_ONCE:  # photographs: a batch of them would take gigabytes
                results, waiting, pixels = results + self._detect(waiting), [], 0
        return results + self._detect(waiting)

    def _detect(self, images: Sequence[np.ndarray | str]) -> list[np.ndarray | str]:
        faces = iter(self.detector([image for image in images if not isinstance(image, str)]))
        return [image if isinstance(image, str) else self.result(image, next(faces)) for image in images]

    def result(self, image: np.ndarray, faces: Sequence[Face]) -> np.ndarray | str:
        try:
            return self.of_face(image, choose_landmarks(faces, *image.shape[:2]))
        except LandmarkError as error:
            return str(error)


class Items(DataLoader):
    """The items of a dataset in order. Left early, it ends its worker processes at once."""

    def __iter__(self) -> Iterator:
        try:
            with hold_stops():  # a half-made iterator cannot be ended
                items = super().__iter__()
            yield from items
        except BaseException as error:
            if self.num_workers:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again, in destructors too
                for worker in multiprocessing.active_children():
                    worker.terminate()  # or each is waited for until its item is done
            raise (worker_error(error) or error) from None


def in_processes(work: FaceBatches, processes: int, device: torch.device) -> Items:
    """The items of `work` in order, made by worker processes; by this one where one is enough.

    Args:
        processes: 0: one per core (a GPU: one per GPU_IMAGES images, GPU_PROCESSES at most).
    """
    if processes == 0:
        cores = torch.get_num_threads()  # those of this rank: torchrun shares them out
        processes = cores
        if device.type == "cuda":
            processes = min(cores, GPU_PROCESSES, max(sum(map(len, work.batches)) // GPU_IMAGES, 1))
    workers = min(processes, len(work))
    cv2.setNumThreads(1)  # ends OpenCV's threads: a forked worker would wait for ever for those of its parent
    # CUDA does not survive a fork
    method = "fork" if device.type == "cpu" and sys.platform == "linux" else "spawn"
    return Items(
        work, batch_size=None, num_workers=workers if workers > 1 else 0, worker_init_fn=one_thread,
        multiprocessing_context=method if workers > 1 else None,
        collate_fn=list)  # as they are: tensors would each take a file descriptor


def one_thread(worker: int) -> None:
    """Begin a worker process: it ends with its parent, leaves Ctrl-C to it, and has one thread."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    cv2.setNumThreads(1)  # of a spawned process; torch's worker processes have one thread already
