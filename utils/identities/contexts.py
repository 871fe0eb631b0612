"""Identity contexts: points on the unit hypersphere of a face recogniser's embeddings, one row per identity."""
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from utils.faces.folders import SIZE, identity_folders, read_image
from utils.runtime import files as runs
from utils.runtime.errors import UserError

BLOCK_BYTES = 128 * 2**20  # memory of one block of cosines
UNIT_TOLERANCE = 1e-4  # of a norm: float32 rounding is far below, a forgotten normalisation far above


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


def normalise(vectors: np.ndarray) -> np.ndarray:
    """The rows of [N, D] scaled to unit norm, float32; a zero row stays zero."""
    norms = row_norms(vectors)[:, None]
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def row_norms(vectors: np.ndarray) -> np.ndarray:
    """The norm of each row of [N, D]: [N] float64."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


# ---- from faces ------------------------------------------------------------------------------------------------------

def extract(folder: Path | str, embed: Callable[[Sequence[Path]], np.ndarray],
            per: str = "identity") -> tuple[list[str], np.ndarray]:
    """Contexts from a folder of faces, `<folder>/<identity>/<image>`, by a recogniser.

    Args:
        embed: N image files -> embeddings [N, D], as utils.recognition.embedding.embed gives them with read=read_face.
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


def read_face(file: Path | str) -> np.ndarray:
    """A face image of any size, resized without aligning it: [112, 112, 3] uint8 RGB (IDiff-Face, arXiv 2308.04995).

    Raises:
        UserError: the file is no readable image.
    """
    image = read_image(Path(file))
    if image.shape[:2] == (SIZE, SIZE):
        return image
    shrinks = min(image.shape[:2]) > SIZE  # area averaging does not alias, but it makes blocks when it enlarges
    return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


# ---- files -----------------------------------------------------------------------------------------------------------

def write(file: Path | str, ids: Sequence[str], contexts: np.ndarray) -> None:
    """Write `ids` [N] str and `contexts` [N, D] float32 as .npz. Raises UserError where check_contexts does."""
    check_contexts(file, ids, contexts)
    runs.write_npz(file, ids=np.array(ids, dtype=str), contexts=contexts.astype(np.float32, copy=False))


def read(file: Path | str, dimension: int | None = None) -> tuple[list[str], np.ndarray]:
    """ids and contexts [N, D] float32, unit norm, of a file that `write` made.

    Args:
        dimension: the width that the diffusion model takes, where it is known.
    Raises:
        UserError: the file is missing or damaged, or check_contexts refuses what it holds.
    """
    runs.require_file(file, "contexts", "run create_sample_identity_contexts.py with the same settings first")
    arrays = runs.read_npz(file, ("ids", "contexts"))
    ids, contexts = arrays["ids"].astype(str).ravel().tolist(), arrays["contexts"]
    check_contexts(file, ids, contexts, dimension)
    return ids, contexts.astype(np.float32, copy=False)


def digest(ids: Sequence[str], contexts: np.ndarray) -> str:
    """SHA-256 of the ids and contexts, hex: what negatives remember of the contexts they belong to."""
    return runs.array_digest(np.array(ids, dtype=str), contexts)


def made_already(file: Path, decides: Mapping[str, Any]) -> bool:
    """Whether `file` exists, by the record beside it (the same name with .json) made with the same settings.

    Args:
        decides: what decides the file's contents: settings and digests of inputs.
    Raises:
        UserError: it exists and was made with other settings, or has no record; the line names the first that differs.
    """
    if not file.exists():
        return False
    mend = "give other contexts another name (contexts.name), or delete the file to make it anew"
    record = file.with_suffix(".json")
    if not record.is_file():
        raise UserError(f"{file}: has no record beside it of how it was made ({record.name}); {mend}")
    earlier = runs.read_json(record).get("decides", {})
    for name in sorted(decides.keys() | earlier.keys()):
        if decides.get(name) != earlier.get(name):
            raise UserError(f"{file}: was made with {name} = {earlier.get(name)!r}, now it is {decides.get(name)!r}; "
                            f"{mend}")
    return True


def check_contexts(file: Path | str, ids: Sequence[str], contexts: np.ndarray, dimension: int | None = None) -> None:
    """Refuse contexts that no stage could use, in one line that names `file` and the mend.

    Args:
        dimension: the width that the diffusion model takes, where it is known.
    Raises:
        UserError: not [N, D] numbers with one id a row; fewer than two identities; repeated ids, or ids that cannot be
            folders; NaN, infinite or zero rows, or rows that are not of unit norm; D is not `dimension`.
    """
    check_vectors(file, contexts, dimension)
    if len(ids) != len(contexts):
        raise UserError(f"{file}: has {len(ids)} ids for {len(contexts)} contexts; make the file again")
    if len(set(ids)) < len(ids):
        repeated = Counter(ids).most_common(1)[0][0]
        raise UserError(f"{file}: the id '{repeated}' occurs more than once; rename or remove the repeated ones")
    for name in ids:
        if not name.strip() or name.startswith(".") or "/" in name or "\\" in name:
            raise UserError(f"{file}: the id '{name}' cannot name a folder of images; rename it")
    off_unit = np.abs(row_norms(contexts) - 1) > UNIT_TOLERANCE
    if off_unit.any():
        row = int(np.argmax(off_unit))
        raise UserError(f"{file}: the context of '{ids[row]}' (row {row}) is not of unit norm; "
                        "divide every row by its norm")


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


# ---- how close contexts are to one another ---------------------------------------------------------------------------

def cosine_blocks(contexts: np.ndarray, pool: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """The cosines of every context to the first `pool` ones, some rows at a time, so that memory stays bounded.

    Args:
        contexts: [N, D], of any norm but zero.
        pool: by default all.
    Yields:
        the first row's number and the rows' cosines [rows, pool], float32.
    """
    unit = normalise(contexts)
    columns = unit[:pool].T
    rows = max(1, BLOCK_BYTES // (4 * columns.shape[1]))
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
