"""Embeddings of many faces."""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from utils.faces.aligned import read_aligned
from utils.faces.images import read_image
from utils.faces.template import ARCFACE, SIZE, TEMPLATES
from utils.recognition.augmentation import network_input
from utils.runtime.errors import UserError
from utils.runtime.progress import StageBar

BATCH = {"cuda": 256, "cpu": 16}  # with more on a CPU, activations pass glibc's 32 MB, beyond which all memory is fetched anew


def read_unaligned(file: Path | str) -> np.ndarray:
    """A face image of any size, resized without aligning it: [112, 112, 3] uint8 RGB (IDiff-Face, arXiv 2308.04995).

    Raises:
        UserError: the file is no readable image.
    """
    image = read_image(Path(file))
    if image.shape[:2] == (SIZE, SIZE):
        return image
    shrinks = min(image.shape[:2]) > SIZE  # area averaging does not alias, but it makes blocks when it enlarges
    return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


@torch.no_grad()  # not inference_mode, which would keep the backbone from being differentiated through later
def embed(backbone: torch.nn.Module, faces: Sequence, device: torch.device, template: str = "arcface", mirror: bool = False,
          read: Callable[..., np.ndarray] = read_aligned) -> np.ndarray:
    """Embed faces with progress, reading ahead in threads.

    Args:
        backbone: faces [B, 3, 112, 112] in [-1, 1] RGB -> embeddings [B, D].
        faces: N of what `read` takes; by default files of aligned faces.
        template: which the faces were aligned to, `arcface` or `arcface_shifted`. A network that knows where a face lies
            (`on_arcface`) is shown shifted faces moved back; others see them as they are, as published.
        mirror: give each face's embedding followed by its mirror image's, [N, 2 D], as verification needs them.
        read: gives one face, uint8 [112, 112, 3] RGB.
    Returns:
        [N, D] or [N, 2 D] float32, not normalised.
    Raises:
        UserError: a face cannot be read, or the network gives a number that is not finite.
    """
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    shift = round((ARCFACE - TEMPLATES[template])[0, 0]) if getattr(backbone, "on_arcface", False) else 0
    batch_size = BATCH[device.type]
    embeddings = None  # one array from the start: small ones kept between large freed ones make memory grow
    with ThreadPoolExecutor(4) as threads, StageBar(total=len(faces), desc="embed", unit="face", delay=1) as progress:
        def load(start: int) -> list:
            return [threads.submit(read, face) for face in faces[start : start + batch_size]]

        waiting = load(0)
        for start in range(0, len(faces), batch_size):
            images, waiting = [future.result() for future in waiting], load(start + batch_size)
            batch = moved_right(network_input(np.stack(images), device), shift)
            sides = [batch, batch.flip(3)] if mirror else [batch]  # moved before: a mirrored face would have to go left
            rows = torch.cat([backbone(side) for side in sides], dim=1).float().cpu().numpy()
            if not np.isfinite(rows).all():
                raise UserError(f"{getattr(backbone, 'file', 'the recogniser')}: embeds faces as numbers that are not finite; "
                                "give another recogniser, or get its weights again")
            if embeddings is None:
                embeddings = np.empty((len(faces), rows.shape[1]), dtype=np.float32)
            embeddings[start : start + len(rows)] = rows
            progress.update(len(images))
    return embeddings


def moved_right(faces: torch.Tensor, pixels: int) -> torch.Tensor:
    """Faces [B, 3, H, W] moved to the right; the border is repeated."""
    return F.pad(faces[..., : faces.shape[-1] - pixels], (pixels, 0, 0, 0), mode="replicate") if pixels else faces
