"""Negative contexts: for each identity, the other identity whose pull is subtracted when its images are sampled.

The strategies of NegFaceDiff (arXiv 2508.09661, section 3): by cosine similarity to the identity's own context,
Close-Neg, Mid-Neg and Far-Neg; another identity at random; Null, the zero vector; and a choice of one's own.
"""
import csv
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.identities.contexts import BLOCK_BYTES, check_vectors, cosine_blocks, row_norms
from utils.runtime import files as runs
from utils.runtime.errors import UserError

NULL = -1  # the index that stands for the zero vector

# Name -> index [N] of each context's negative, from (contexts [N, D], pool, seed, custom index [N]).
# A rank counts an identity's cosines to the `others` in the pool upwards from 0, the lowest.
STRATEGIES: dict[str, Callable[[np.ndarray, int, int, np.ndarray | None], np.ndarray]] = {
    "close": lambda contexts, pool, seed, custom: _at_rank(contexts, pool, lambda others: others - 1),
    "mid": lambda contexts, pool, seed, custom: _at_rank(contexts, pool, lambda others: (others - 1) // 2),
    "far": lambda contexts, pool, seed, custom: _at_rank(contexts, pool, lambda others: 0),
    "rand": lambda contexts, pool, seed, custom: _any_other(len(contexts), pool, seed),
    "null": lambda contexts, pool, seed, custom: np.full(len(contexts), NULL),
    "custom": lambda contexts, pool, seed, custom: custom,
}


def select(contexts: np.ndarray, strategy: str, seed: int = 0, pool: int = 0,
           custom: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Each context's negative among the other identities; never itself, though a duplicate of it may be chosen.

    `mid` is the lower median of the cosines to the others. Among exactly equal cosines the lowest index wins.

    Args:
        contexts: [N, D]; only their directions count.
        strategy: a name in STRATEGIES.
        seed: of `rand`.
        pool: negatives are chosen among the first `pool` contexts; 0: all. `null` and `custom` do not look at it.
        custom: [N] the negatives of `custom`, as read_custom gives them.
    Returns:
        index: [N] int64, -1 for `null`.
        similarity: [N] float32, the cosine to the negative; NaN for `null`.
    Raises:
        UserError: contexts that have no direction, or a pool in which an identity has no other.
    """
    contexts = np.asarray(contexts)
    check_vectors("contexts", contexts)
    if pool == 1 or pool > len(contexts):
        raise UserError(f"negatives.pool: {pool} of {len(contexts)} contexts cannot give everyone another identity; "
                        f"set 2 to {len(contexts)}, or 0 for all")
    index = STRATEGIES[strategy](contexts, pool or len(contexts), seed, custom).astype(np.int64)
    return index, similarities(contexts, index)


def similarities(contexts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The cosine of each context [N, D] to the one at `index` [N]: [N] float32, NaN where the index is -1."""
    cosines = np.full(len(contexts), np.nan, dtype=np.float32)
    norms = row_norms(contexts)
    rows = max(1, BLOCK_BYTES // (16 * contexts.shape[1]))
    chosen = np.flatnonzero(index != NULL)
    for start in range(0, len(chosen), rows):
        these = chosen[start : start + rows]
        cosines[these] = _exact_cosines(contexts, norms, these, index[these])
    return cosines


def _at_rank(contexts: np.ndarray, pool: int, rank_of: Callable[[int], int]) -> np.ndarray:
    """The index [N] of the context whose cosine has rank `rank_of(number of others)` among the others in the pool.

    A fast float32 product finds the cosine of that rank to within its rounding error. Only the few contexts that the
    error leaves in doubt are compared in float64, so the answer depends neither on the blocks nor on the BLAS.
    """
    # |fl(x . y) - x . y| <= D u for unit vectors, and 2 u each from rounding the vectors to float32; u = eps / 2.
    error = (contexts.shape[1] + 4) * np.finfo(np.float32).eps / 2
    norms = row_norms(contexts)
    index = np.empty(len(contexts), dtype=np.int64)

    def choose(row: int, cosines: np.ndarray) -> None:
        others = pool
        if row < pool:
            others -= 1
            cosines[row] = np.inf  # sorts itself behind all others
        rank = rank_of(others)
        ordered = np.partition(cosines, rank)
        in_doubt = np.flatnonzero(np.abs(cosines - ordered[rank]) <= 2 * error)
        surely_lower = np.count_nonzero(ordered[:rank] < ordered[rank] - 2 * error)
        exact = _exact_cosines(contexts, norms, row, in_doubt)
        index[row] = in_doubt[np.argmax(exact == np.sort(exact)[rank - surely_lower])]

    with ThreadPoolExecutor() as threads:  # numpy's partition and comparisons release the interpreter lock
        for start, block in cosine_blocks(contexts, pool):
            list(threads.map(choose, range(start, start + len(block)), block))
    return index


def _exact_cosines(contexts: np.ndarray, norms: np.ndarray, rows: int | np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosines of `rows` (one, or as many as `others`) to `others`, in float64, pair by pair."""
    products = np.vecdot(contexts[rows].astype(np.float64), contexts[others].astype(np.float64))
    return products / (norms[rows] * norms[others])


def _any_other(number: int, pool: int, seed: int) -> np.ndarray:
    """Uniformly one of the pool's other identities: [number] int64."""
    rows = np.arange(number)
    in_pool = rows < pool
    index = np.random.default_rng(seed).integers(0, pool - in_pool)
    return index + (in_pool & (index >= rows))  # skips the identity itself


def read_custom(file: Path | str, ids: Sequence[str]) -> np.ndarray:
    """The negatives [N] int64 that a CSV of `identity,negative` (the first line may say so) names for `ids` [N].

    Raises:
        UserError: the file is missing, or a line is not two known ids, names an identity twice or as its own negative,
            or an identity has no line.
    """
    runs.require_file(file, "negatives.custom_file", "give a CSV with the columns identity,negative")
    position = {name: row for row, name in enumerate(ids)}
    index = np.full(len(ids), NULL, dtype=np.int64)
    # What is not UTF-8 becomes an id that no context has, and is refused with its line.
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
        reader = csv.reader(lines)
        for fields in reader:
            fields = [field.strip() for field in fields]
            where = f"{file}:{reader.line_num}"
            if not any(fields) or (reader.line_num == 1 and fields == ["identity", "negative"]):
                continue
            if len(fields) != 2:
                raise UserError(f"{where}: has {len(fields)} fields; write identity,negative")
            for name in fields:
                if name not in position:
                    raise UserError(f"{where}: there is no identity '{name}' in the contexts; correct the id")
            identity, negative = (position[name] for name in fields)
            if identity == negative:
                raise UserError(f"{where}: '{fields[0]}' is its own negative; name another identity")
            if index[identity] != NULL:
                raise UserError(f"{where}: '{fields[0]}' has a negative already; keep one line per identity")
            index[identity] = negative
    if (index == NULL).any():
        missing = ids[int(np.argmax(index == NULL))]
        raise UserError(f"{file}: has no line for '{missing}' ({np.count_nonzero(index == NULL)} identities lack one); "
                        "add a negative for every identity of the contexts")
    return index


def chosen_by(strategy: str, pool: int, seed: int) -> dict[str, int]:
    """Those of the settings `pool` and `seed` that a strategy's choice depends on, by name."""
    chosen = {} if strategy in ("null", "custom") else {"pool": pool}
    return chosen | {"seed": seed} if strategy == "rand" else chosen


def write(file: Path | str, ids: Sequence[str], index: np.ndarray, similarity: np.ndarray, contexts_digest: str,
          chosen_by: Mapping[str, int]) -> None:
    """Write what `select` gave, with the digest of the contexts it belongs to and the settings it was `chosen_by`."""
    runs.write_npz(file, ids=np.array(ids, dtype=str), index=index.astype(np.int64),
                   similarity=similarity.astype(np.float32), contexts_digest=np.array(contexts_digest),
                   pool=np.array(chosen_by.get("pool", 0)), seed=np.array(chosen_by.get("seed", 0)))


def read(file: Path | str, contexts_digest: str, ids: Sequence[str],
         chosen_by: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """index [N] int64 and similarity [N] float32 of a file that `write` made.

    Args:
        contexts_digest: utils.identities.contexts.digest of the contexts in use.
        ids: their ids [N].
        chosen_by: the settings in use, as in `write`.
    Raises:
        UserError: the file is missing, damaged, belongs to other contexts, or was made with other settings.
    """
    mend = "run create_negative_contexts.py with the same settings"
    runs.require_file(file, "negatives", f"{mend} first")
    arrays = runs.read_npz(file, ("ids", "index", "similarity", "contexts_digest", "pool", "seed"))
    for name, value in chosen_by.items():
        if int(arrays[name]) != value:
            raise UserError(f"{file}: was made with negatives.{name} = {arrays[name]}, now it is {value}; delete it and "
                            f"{mend}")
    index, similarity = arrays["index"], arrays["similarity"]
    if str(arrays["contexts_digest"]) != contexts_digest or arrays["ids"].tolist() != list(ids):
        raise UserError(f"{file}: holds negatives of other contexts than those in use; delete it and {mend}")
    rows = np.arange(len(ids))
    if not (index.shape == similarity.shape == rows.shape and index.dtype.kind == "i"
            and ((NULL <= index) & (index < len(ids)) & (index != rows)).all()):
        raise UserError(f"{file}: does not name another identity for each; delete it and {mend}")
    return index, similarity
