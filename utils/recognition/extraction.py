"""Contexts from a folder of faces, by a recogniser."""
from pathlib import Path

import numpy as np
import torch

from models.published import load_backbone
from utils.faces.folders import identity_folders
from utils.identities.contexts import normalise
from utils.recognition.embedding import embed, read_unaligned


def extract(folder: Path | str, recogniser: Path | str, device: torch.device, per: str) -> tuple[list[str], np.ndarray]:
    """Contexts from a folder of faces, `<folder>/<identity>/<image>`, by a recogniser.

    Args:
        per: `identity`: the normalised mean of an identity's normalised embeddings, named by the identity's folder;
            `image`: each image's normalised embedding, named `<identity>--<image without its suffix>`.
    Returns:
        ids and contexts [N, D] float32, unit norm.
    Raises:
        UserError: there is no such folder, an image is unreadable, or the weights are of no recogniser.
    """
    backbone, folders = load_backbone(recogniser), identity_folders(folder)
    images = [image for images in folders.values() for image in images]
    embeddings = normalise(embed(backbone, images, device, read=read_unaligned))
    if per == "image":
        return [f"{image.parent.name}--{image.stem}" for image in images], embeddings
    firsts = np.cumsum([0] + [len(images) for images in folders.values()][:-1])
    return list(folders), normalise(np.add.reduceat(embeddings, firsts, axis=0, dtype=np.float64))
