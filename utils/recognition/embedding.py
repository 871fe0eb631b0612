"""Embeddings of many aligned faces."""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.faces.folders import SIZE, read_image
from utils.recognition.augmentation import normalise
from utils.runtime.errors import UserError

CPU_BATCH = 16  # with more, activations pass glibc's 32 MB, beyond which all memory is fetched anew: half as fast


def read_aligned(file: Path | str) -> np.ndarray:
    """An aligned face, uint8 [112, 112, 3] RGB. Raises UserError where it is unreadable or of another size."""
    image = read_image(Path(file))
    if image.shape[:2] != (SIZE, SIZE):
        raise UserError(f"{file}: is {image.shape[1]} x {image.shape[0]} px, not {SIZE} x {SIZE}; run align.py first")
    return image


@torch.no_grad()  # not inference_mode, which would keep the backbone from being differentiated through later
def embed(backbone: torch.nn.Module, faces: Sequence, device: torch.device, template: str, batch_size: int = 64,
          mirror: bool = False, read: Callable[..., np.ndarray] = read_aligned) -> np.ndarray:
    """Embed faces with progress, reading ahead in threads.

    Args:
        backbone: (faces [B, 3, 112, 112] in [-1, 1] RGB, template) -> embeddings [B, D].
        faces: N of what `read` takes; by default files of aligned faces.
        template: which the faces were aligned to, `arcface` or `arcface_shifted`.
        mirror: give each face's embedding followed by its mirror image's, [N, 2 D], as verification needs them.
        read: gives one face, uint8 [112, 112, 3] RGB.
    Returns:
        [N, D] or [N, 2 D] float32, not normalised.
    Raises:
        UserError: a face cannot be read.
    """
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    if device.type == "cpu":
        batch_size = min(batch_size, CPU_BATCH)
    embeddings = None  # one array from the start: small ones kept between large freed ones make memory grow
    with ThreadPoolExecutor(4) as threads, tqdm(total=len(faces), desc="embed", unit="face", delay=1) as progress:
        def load(start: int) -> list:
            return [threads.submit(read, face) for face in faces[start : start + batch_size]]

        waiting = load(0)
        for start in range(0, len(faces), batch_size):
            images, waiting = [future.result() for future in waiting], load(start + batch_size)
            batch = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
            batch = normalise(batch).contiguous(memory_format=torch.channels_last)
            sides = [batch, batch.flip(3)] if mirror else [batch]
            rows = torch.cat([backbone(side, template) for side in sides], dim=1).float().cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(faces), rows.shape[1]), dtype=np.float32)
            embeddings[start : start + len(rows)] = rows
            progress.update(len(images))
    return embeddings
