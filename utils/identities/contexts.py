"""Identity contexts: points on the unit hypersphere of a face recogniser's embeddings, one row per identity.

Drawn ones, their files, and how close they are to one another. Those of real faces: utils/recognition/extraction.py.
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models import context_files
from models.context_files import check_contexts, check_vectors, digest, normalise, row_norms, write
from utils.runtime.records import check_sources

__all__ = ["uniform", "gaussian", "cosine_blocks", "crowding", "closest_pair", "check_contexts", "check_vectors", "digest",
           "normalise", "read", "row_norms", "write"]

BLOCK_BYTES = 128 * 2**20  # memory of one block of cosines


def uniform(number: int, dimension: int, seed: int) -> np.ndarray:
    """Contexts drawn uniformly on the unit hypersphere (NegFaceDiff, arXiv 2508.09661): [number, dimension] float32.

    The first rows are the same whatever `number` is.
    """
    return normalise(np.random.default_rng(seed).standard_normal((number, dimension)))


def gaussian(number: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """Contexts drawn from the normal distribution of real embeddings, then normalised: [number, D] float32.

    The first rows are the same whatever `number` is.

    Args:
        mean, covariance: [D] and [D, D], of unit embeddings.
    """
    values, axes = np.linalg.eigh(covariance.astype(np.float64))
    draws = np.random.default_rng(seed).standard_normal((number, len(mean)))
    return normalise(mean + draws * np.sqrt(values.clip(min=0)) @ axes.T)


def read(file: Path | str, dimension: int | None = None) -> tuple[list[str], np.ndarray]:
    """ids and contexts [N, D] float32, unit norm, of a file that stage 1 made.

    Args:
        dimension: D, where it is known.
    Raises:
        UserError: as models.context_files.read; or what they were made from has changed since.
    """
    ids, contexts = context_files.read(file, dimension)
    check_sources(Path(file), "create_sample_identity_contexts.py")
    return ids, contexts


# ---- how close contexts are to one another ---------------------------------------------------------------------------

def cosine_blocks(contexts: np.ndarray, pool: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """The cosines of every context to the first `pool` ones, some rows at a time, so that memory stays bounded.

    Args:
        contexts: [N, D], of any norm but zero.
        pool: by default all.
    Yields:
        the first row's number and the rows' cosines [rows, pool], float64.
    """
    unit = contexts / row_norms(contexts)[:, None]
    columns = unit[:pool].T
    rows = max(1, BLOCK_BYTES // (8 * columns.shape[1]))
    for start in tqdm(range(0, len(unit), rows), unit="block", disable=None, delay=1, leave=False):
        yield start, unit[start : start + rows] @ columns


def crowding(contexts: np.ndarray) -> np.ndarray:
    """Each context's highest cosine to another: [N] float32; the higher, the more two identities look alike."""
    highest = np.empty(len(contexts), dtype=np.float32)
    for start, cosines in cosine_blocks(contexts):
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        highest[start : start + len(cosines)] = cosines.max(axis=1)
    return highest.clip(-1, 1)


def closest_pair(contexts: np.ndarray, crowding: np.ndarray) -> tuple[int, int]:
    """The rows of the two contexts that look most alike, by the `crowding` [N] of contexts [N, D]."""
    row = int(np.argmax(crowding))
    cosines = normalise(contexts) @ normalise(contexts[row : row + 1])[0]
    cosines[row] = -np.inf
    return row, int(np.argmax(cosines))
