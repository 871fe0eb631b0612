"""Files of identity contexts, and what contexts must be for any stage to use them."""
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.runtime import files, foreign_arrays
from utils.runtime.errors import UserError
from utils.runtime.records import check_digest

MOST_ID_BYTES = 200  # in UTF-8: file systems take 255, and names of images and parts are longer than ids
UNIT_TOLERANCE = 1e-4  # of a norm: float32 rounding is far below, a forgotten normalisation far above


def write(file: Path | str, ids: Sequence[str], contexts: np.ndarray) -> None:
    """Write `ids` [N] str and `contexts` [N, D] float32 as .npz. Raises UserError where check_contexts does."""
    check_contexts(file, ids, contexts)
    files.write_npz(file, ids=np.array(ids, dtype=str), contexts=contexts.astype(np.float32, copy=False))


def read(file: Path | str, fix: str = "delete it and run create_sample_identity_contexts.py again"
         ) -> tuple[list[str], np.ndarray]:
    """ids and contexts [N, D] float32, unit norm, of a file that `write` made.

    Args:
        fix: what to do about a damaged file.
    Raises:
        UserError: the file is missing or damaged, or check_contexts refuses what it holds.
    """
    files.require_file(file, "contexts", "run create_sample_identity_contexts.py with the same settings first")
    arrays = files.read_npz(file, ("ids", "contexts"), fix)
    with foreign_arrays.reading(file, "a file of contexts", fix):  # ids may be bytes that are no text
        ids, contexts = arrays["ids"].astype(str).ravel().tolist(), arrays["contexts"]
    check_contexts(file, ids, contexts)
    check_digest(Path(file), digest(ids, contexts))
    return ids, contexts.astype(np.float32, copy=False)


def digest(ids: Sequence[str], contexts: np.ndarray) -> str:
    """SHA-256 of the ids and contexts, hex: what negatives remember of the contexts they belong to."""
    return files.array_digest(np.array(ids, dtype=str), contexts)


def normalise(vectors: np.ndarray) -> np.ndarray:
    """The rows of [N, D] scaled to unit norm, float32; a zero row stays zero."""
    norms = row_norms(vectors)[:, None]
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def row_norms(vectors: np.ndarray) -> np.ndarray:
    """The norm of each row of [N, D]: [N] float64."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def check_contexts(file: Path | str, ids: Sequence[str], contexts: np.ndarray, dimension: int | None = None) -> None:
    """Refuse contexts that no stage could use, in one line that names `file` and the fix.

    Args:
        dimension: the width that the diffusion model takes, where it is known.
    Raises:
        UserError: not [N, D] numbers with one id a row; fewer than two identities; repeated ids, or ids that cannot be
            folders; NaN, infinite or zero rows, or rows that are not of unit norm; D is not `dimension`.
    """
    check_vectors(file, contexts, dimension)
    if len(ids) != len(contexts):
        raise UserError(f"{file}: has {len(ids)} ids for {len(contexts)} contexts; make the file again")
    names = Counter(unicodedata.normalize("NFC", name) for name in ids)  # as file systems and lists compare them
    if len(names) < len(ids):
        repeated = names.most_common(1)[0][0]
        raise UserError(f"{file}: the id {repeated[:200]!r} occurs more than once; rename or remove the repeated ones")
    for name in ids:
        if not can_name_folder(name):
            raise UserError(f"{file}: the id {name[:200]!r} cannot name a folder of images; rename it")
    off_unit = np.abs(row_norms(contexts) - 1) > UNIT_TOLERANCE
    if off_unit.any():
        row = int(np.argmax(off_unit))
        raise UserError(f"{file}: the context of {ids[row]!r} (row {row}) is not of unit norm; "
                        "divide every row by its norm")


def can_name_folder(name: str) -> bool:
    """Whether a name is a visible folder's on every system, of UTF-8 and not too long."""
    if not name.strip() or name.startswith(".") or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return False  # control characters and halves of surrogate pairs
    return not {"/", "\\"} & set(name) and len(name.encode()) <= MOST_ID_BYTES


def check_vectors(file: Path | str, vectors: np.ndarray, dimension: int | None = None) -> None:
    """The part of check_contexts that holds for any directions in space, of whatever norm. Raises UserError."""
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise UserError(f"{file}: contexts are {vectors.dtype} of shape {vectors.shape}, not floats [N, D]; "
                        "give one row of floats per identity")
    if dimension is not None and vectors.shape[1] != dimension:
        raise UserError(f"{file}: contexts are {vectors.shape[1]} wide, the diffusion model takes {dimension}; "
                        "use contexts of the recogniser that the model was trained with")
    if len(vectors) < 2:
        raise UserError(f"{file}: holds {len(vectors)} context(s), and a negative takes another identity; "
                        "give at least two")
    finite = np.isfinite(vectors).all(axis=1)
    zero = ~vectors.any(axis=1)
    if not finite.all() or zero.any():
        row = int(np.argmax(~finite | zero))
        fault = "is all zeros" if zero[row] else "holds NaN or infinite values"
        raise UserError(f"{file}: the context in row {row} {fault}; remove that identity or make its context again")
