"""Negative contexts: for each identity, the context whose pull is subtracted when its images are sampled.

The strategies of NegFaceDiff (arXiv 2508.09661, section 3), by cosine similarity to the identity's own context: Close-Neg,
Mid-Neg and Far-Neg; another identity at random; Null, the zero vector. `average`, which the published code names and
leaves unwritten, and `antipode` give vectors that are no identity of the list.
"""
import csv
import io
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from utils.identities.contexts import check_vectors, cosine_blocks, row_norms
from utils.runtime.errors import UserError
from utils.runtime.files import array_digest, read_npz, require_file, write_npz
from utils.runtime.foreign_arrays import read_text
from utils.runtime.records import check_digest, check_sources

NOBODY = -1  # the index of a negative that is no identity of the list
TIE = 1e-12  # cosines that differ by no more count as equal: products in another order round otherwise


def close(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    return _choose(contexts, pool, -np.inf, lambda cosines, others: cosines.max(axis=1))


def mid(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    """The lower median."""
    return _choose(contexts, pool, np.inf, _lower_median)


def far(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    return _choose(contexts, pool, np.inf, lambda cosines, others: cosines.min(axis=1))


def rand(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    """Uniformly one of the others."""
    rows = np.arange(len(contexts))
    index = np.random.default_rng(seed).integers(0, pool - (rows < pool))
    return index + ((rows < pool) & (index >= rows))  # skips the identity itself


def null(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    return np.zeros_like(contexts)


def average(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    """The mean direction of the others."""
    unit = contexts / row_norms(contexts)[:, None]
    own = np.where(np.arange(len(unit))[:, None] < pool, unit, 0)
    sums = unit[:pool].sum(axis=0) - own
    norms = row_norms(sums)
    if (norms < TIE * pool).any():
        raise UserError(f"negatives.strategy: average has no direction for the context in row {norms.argmin()}, whose "
                        "others cancel out; choose another strategy or pool")
    return sums / norms[:, None]


def antipode(contexts: np.ndarray, pool: int, seed: int) -> np.ndarray:
    return -contexts


# Each (contexts [N, D], pool, seed) -> index [N] of another identity among the first `pool`, or negatives [N, D].
STRATEGIES: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "close": close, "mid": mid, "far": far, "rand": rand, "null": null, "average": average, "antipode": antipode}


def select(contexts: np.ndarray, strategy: str, seed: int = 0, pool: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each context's negative; never itself, though a duplicate of it may be chosen.

    Cosines within 1e-12 count as equal, and among equal ones the lowest index wins.

    Args:
        contexts: [N, D]; only their directions count.
        strategy: a name in STRATEGIES.
        seed: of `rand`.
        pool: negatives are chosen among the first `pool` contexts; 0: all.
    Returns:
        negatives: [N, D] float32; zeros for `null`.
        index: [N] int64, which context the negative is; -1 where it is no identity of the list.
        similarity: [N] float32, the cosine to the negative; NaN for the zero vector.
    Raises:
        UserError: contexts that have no direction, a pool in which an identity has no other, or others without a mean.
    """
    contexts = np.asarray(contexts)
    check_vectors("contexts", contexts)
    if pool == 1 or pool > len(contexts):
        raise UserError(f"negatives.pool: {pool} of {len(contexts)} contexts cannot give everyone another identity; "
                        f"set 2 to {len(contexts)}, or 0 for all")
    return from_choice(contexts, STRATEGIES[strategy](contexts, pool or len(contexts), seed))


def from_choice(contexts: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `select` returns, from a strategy's index [N] or vectors [N, D]."""
    index = choice.astype(np.int64) if choice.ndim == 1 else np.full(len(contexts), NOBODY)
    negatives = (contexts[index] if choice.ndim == 1 else choice).astype(np.float32)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: the zero vector has no direction
        similarity = np.vecdot(contexts, negatives, dtype=np.float64) / (row_norms(contexts) * row_norms(negatives))
    return negatives, index, similarity.astype(np.float32)


def _choose(contexts: np.ndarray, pool: int, own: float, wanted: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The index [N] of the first context in the pool with the wanted cosine.

    Args:
        own: stands in for an identity's cosine to itself.
        wanted: (cosines [rows, pool], how many of them are to others [rows]) -> the wanted one of each row [rows].
    """
    index = np.empty(len(contexts), dtype=np.int64)
    for start, cosines in cosine_blocks(contexts, pool):
        rows = np.arange(start, start + len(cosines))
        in_pool = rows < pool
        cosines[np.flatnonzero(in_pool), rows[in_pool]] = own
        value = wanted(cosines, pool - in_pool)
        index[rows] = (np.abs(cosines - value[:, None]) <= TIE).argmax(axis=1)
    return index


def _lower_median(cosines: np.ndarray, others: np.ndarray) -> np.ndarray:
    ranks = (others - 1) // 2
    ordered = np.partition(cosines, np.unique(ranks), axis=1)
    return ordered[np.arange(len(ranks)), ranks]


# ---- files -----------------------------------------------------------------------------------------------------------

def read_custom(file: Path | str, ids: Sequence[str]) -> np.ndarray:
    """The negatives [N] int64 that a CSV of `identity,negative` (the first line may say so) names for `ids` [N].

    Raises:
        UserError: the file is missing, or a line is not two known ids, names an identity twice or as its own negative,
            or an identity has no line.
    """
    require_file(file, "negatives.custom_file", "give a CSV with the columns identity,negative")
    position = {unicodedata.normalize("NFC", name): row for row, name in enumerate(ids)}
    index = np.full(len(ids), NOBODY, dtype=np.int64)
    reader = csv.reader(io.StringIO(read_text(file, "CSV"), newline=""))
    while True:
        try:
            fields = [unicodedata.normalize("NFC", field.strip()) for field in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{file}:{reader.line_num}: {error}; write identity,negative") from None
        where = f"{file}:{reader.line_num}"
        if not any(fields) or (reader.line_num == 1 and fields == ["identity", "negative"]):
            continue
        if len(fields) != 2:
            raise UserError(f"{where}: has {len(fields)} fields; write identity,negative")
        for name in fields:
            if name not in position:
                raise UserError(f"{where}: there is no identity {name[:200]!r} in the contexts; correct the id")
        identity, negative = (position[name] for name in fields)
        if identity == negative:
            raise UserError(f"{where}: {fields[0]!r} is its own negative; name another identity")
        if index[identity] != NOBODY:
            raise UserError(f"{where}: {fields[0]!r} has a negative already; keep one line per identity")
        index[identity] = negative
    if (index == NOBODY).any():
        missing = ids[int(np.argmax(index == NOBODY))]
        raise UserError(f"{file}: has no line for '{missing}' ({np.count_nonzero(index == NOBODY)} identities lack one); "
                        "add a negative for every identity of the contexts")
    return index


def write(file: Path | str, ids: Sequence[str], negatives: np.ndarray, index: np.ndarray, similarity: np.ndarray,
          contexts_digest: str) -> None:
    """Write what `select` gave, with the ids and the digest of the contexts it belongs to."""
    write_npz(file, ids=np.array(ids, dtype=str), negatives=negatives.astype(np.float32), index=index.astype(np.int64),
              similarity=similarity.astype(np.float32), contexts_digest=np.array(contexts_digest))


def read(file: Path | str, ids: Sequence[str], dimension: int, contexts_digest: str) -> np.ndarray:
    """The negatives [N, D] float32 of a file that `write` made.

    Args:
        ids, dimension, contexts_digest: of the contexts in use.
    Raises:
        UserError: the file is missing, damaged, or belongs to other contexts; or what it was made from has changed since.
    """
    fix = "run create_negative_contexts.py with the same settings"
    require_file(file, "negatives", f"{fix} first")
    arrays = read_npz(file, ("ids", "negatives", "contexts_digest"))
    if str(arrays["contexts_digest"]) != contexts_digest or arrays["ids"].tolist() != list(ids):
        raise UserError(f"{file}: holds negatives of other contexts than those in use; delete it and {fix}")
    negatives = arrays["negatives"]
    if negatives.shape != (len(ids), dimension) or negatives.dtype != np.float32 or not np.isfinite(negatives).all():
        raise UserError(f"{file}: does not hold a finite negative for each identity; delete it and {fix}")
    check_digest(Path(file), array_digest(negatives))
    check_sources(Path(file), "create_negative_contexts.py")
    return negatives
