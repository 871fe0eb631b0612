"""Contexts from a folder of faces, by a recogniser."""
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.faces.folders import identity_folders
from utils.identities.contexts import normalise


def extract(folder: Path | str, embed: Callable[[Sequence[Path]], np.ndarray],
            per: str = "identity") -> tuple[list[str], np.ndarray]:
    """Contexts from a folder of faces, `<folder>/<identity>/<image>`, by a recogniser.

    Args:
        embed: N image files -> embeddings [N, D], as utils.recognition.embedding.embed gives them with read=read_unaligned.
        per: `identity`: the normalised mean of an identity's normalised embeddings, named by the identity's folder;
            `image`: each image's normalised embedding, named `<identity>--<image without its suffix>`.
    Returns:
        ids and contexts [N, D] float32, unit norm.
    Raises:
        UserError: there is no such folder, or an image is unreadable.
    """
    folders = identity_folders(folder)
    images = [image for images in folders.values() for image in images]
    embeddings = normalise(embed(images))
    if per == "image":
        return [f"{image.parent.name}--{image.stem}" for image in images], embeddings
    firsts = np.cumsum([0] + [len(images) for images in folders.values()][:-1])
    return list(folders), normalise(np.add.reduceat(embeddings, firsts, axis=0, dtype=np.float64))
