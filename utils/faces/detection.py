"""Batches of images whose faces are found in worker processes: what alignment and training have in common."""
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from utils.faces.folders import read_image
from utils.faces.template import Face, FaceDetector, LandmarkError, choose_landmarks
from utils.runtime.errors import UserError

GPU_PROCESSES = 4  # at most by default: each holds a CUDA context of its own


class FaceBatches(Dataset):
    """Batches of images, detected where they are asked for.

    Item i is, for each image of batch i, what `of_face` makes of it, or the reason (str) why there is no face.

    Args:
        batches: image files.
        of_face: (image [H, W, 3] uint8 RGB, landmarks [5, 2]) -> an array; it may raise LandmarkError.
        minimum_face: the smallest face to look for, as a part of the image's shorter side.
    """

    def __init__(self, batches: Sequence[Sequence[Path]], of_face: Callable[[np.ndarray, np.ndarray], np.ndarray],
                 minimum_face: float, device: torch.device) -> None:
        self.batches, self.of_face, self.minimum_face, self.device = batches, of_face, minimum_face, device

    @cached_property
    def detector(self) -> FaceDetector:
        return FaceDetector(self.minimum_face, self.device)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[np.ndarray | str]:
        images = [read_or_reason(path) for path in self.batches[number]]
        faces = iter(self.detector([image for image in images if not isinstance(image, str)]))
        return [image if isinstance(image, str) else self.result(image, next(faces)) for image in images]

    def result(self, image: np.ndarray, faces: Sequence[Face]) -> np.ndarray | str:
        try:
            return self.of_face(image, choose_landmarks(faces, *image.shape[:2]))
        except LandmarkError as error:
            return str(error)


def read_or_reason(image: Path) -> np.ndarray | str:
    """[H, W, 3] uint8 RGB, or why the file cannot be read."""
    try:
        return read_image(image)
    except UserError as error:
        return str(error).removeprefix(f"{image}: ")  # failures.csv names the image already


def in_processes(work: FaceBatches, processes: int, device: torch.device) -> DataLoader:
    """The items of `work` in order, made by worker processes; by this one where one is enough.

    Args:
        processes: 0: one a core (a GPU: GPU_PROCESSES at most).
    """
    if processes == 0:
        cores = torch.get_num_threads()  # those of this rank: torchrun shares them out
        processes = min(cores, GPU_PROCESSES) if device.type == "cuda" else cores
    workers = min(processes, len(work))
    return DataLoader(
        work, batch_size=None, num_workers=workers if workers > 1 else 0, worker_init_fn=one_thread,
        multiprocessing_context="spawn" if workers > 1 and device.type == "cuda" else None,  # CUDA does not survive a fork
        collate_fn=list)  # as they are: tensors would each take a file descriptor


def one_thread(worker: int) -> None:
    cv2.setNumThreads(1)  # torch's worker processes have one thread already
