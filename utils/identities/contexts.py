"""Identity contexts: points on the unit hypersphere of a face recogniser's embeddings, one row per identity.

Drawn ones, their files, and how close they are to one another. Those of real faces: utils/recognition/extraction.py.
"""
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models import context_files
from models.context_files import check_contexts, check_vectors, digest, normalise, row_norms, write
from utils.runtime.errors import UserError
from utils.runtime.records import check_sources

__all__ = ["uniform", "gaussian", "apart", "cosine_blocks", "crowding", "closest_pair", "check_contexts", "check_vectors",
           "digest", "normalise", "read", "row_norms", "write"]

BLOCK_BYTES = 128 * 2**20  # memory of one block of cosines
CHUNK, DRAWS = 1024, 100  # contexts drawn at a time where they are kept apart; draws for each, until there is no room left


def uniform(number: int, dimension: int, seed: int, highest_cosine: float = 1.0) -> np.ndarray:
    """Contexts drawn uniformly on the unit hypersphere (NegFaceDiff, arXiv 2508.09661): [number, dimension] float32.

    The first rows are the same whatever `number` is.

    Args:
        highest_cosine: as in `apart`.
    """
    stream = np.random.default_rng(seed)
    return apart(lambda rows: normalise(stream.standard_normal((rows, dimension))), number, highest_cosine)


def gaussian(number: int, mean: np.ndarray, covariance: np.ndarray, seed: int, highest_cosine: float = 1.0) -> np.ndarray:
    """Contexts drawn from the normal distribution of real embeddings, then normalised: [number, D] float32.

    The first rows are the same whatever `number` is.

    Args:
        mean, covariance: [D] and [D, D], of unit embeddings.
        highest_cosine: as in `apart`.
    """
    values, axes = np.linalg.eigh(covariance.astype(np.float64))
    stream, spread = np.random.default_rng(seed), np.sqrt(values.clip(min=0))
    return apart(lambda rows: normalise(mean + stream.standard_normal((rows, len(mean))) * spread @ axes.T), number,
                 highest_cosine)


def apart(draw: Callable[[int], np.ndarray], number: int, highest_cosine: float) -> np.ndarray:
    """The first `number` draws of which none is more alike than that to one before it that was taken: [number, D] float32.

    Args:
        draw: how many -> the next draws, unit norm; always as many at a time, so that the first rows do not depend on `number`.
        highest_cosine: 1: the draws as they come.
    Raises:
        UserError: fewer are found among DRAWS times as many draws.
    """
    if highest_cosine >= 1:
        return draw(number)
    taken, drawn = draw(0), 0
    with tqdm(total=number, desc="draw", unit="context", disable=None, delay=1, leave=False) as progress:
        while len(taken) < number:
            if drawn >= DRAWS * number:
                raise UserError(f"contexts.highest_cosine: {highest_cosine:g} leaves room for {len(taken)} of the {number} "
                                f"contexts, in {drawn} draws; raise it, or lower contexts.number")
            rows = draw(CHUNK)
            drawn += len(rows)
            free = rows[(rows.astype(np.float64) @ taken.T.astype(np.float64) <= highest_cosine).all(axis=1)]
            fits = free.astype(np.float64) @ free.T.astype(np.float64) <= highest_cosine
            chosen: list[int] = []
            for row in range(len(free)):
                if fits[row, chosen].all():
                    chosen.append(row)
            taken = np.concatenate([taken, free[chosen]])
            progress.update(len(chosen))
    return taken[:number]


def read(file: Path | str) -> tuple[list[str], np.ndarray]:
    """ids and contexts [N, D] float32, unit norm, of a file that stage 1 made.

    Raises:
        UserError: as models.context_files.read; or what they were made from has changed since.
    """
    ids, contexts = context_files.read(file)
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
