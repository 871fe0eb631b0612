"""Verification benchmarks: pair protocols in ten folds, IJB-C, and the readers of their files."""
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from tqdm import tqdm

from utils.evaluation.scores import unit_rows
from utils.faces.images import FORMATS
from utils.faces.template import ARCFACE, COLLINEAR, SIZE
from utils.runtime import foreign_arrays
from utils.runtime.errors import UserError, is_out_of_memory
from utils.runtime.files import require_file

THRESHOLDS = np.arange(0, 4, 0.01)  # squared Euclidean distances of unit vectors
FOLDS = 10

# Pair benchmarks in insightface's format: name -> stem of the .bin file.
BENCHMARKS = {"LFW": "lfw", "AgeDB-30": "agedb_30", "CFP-FP": "cfp_fp", "CALFW": "calfw", "CPLFW": "cplfw"}

IMAGE_BLOCK = 8192
PAIR_BLOCK = 8192


# ---- pair protocols: LFW and the .bin benchmarks ---------------------------------------------------------------------

def ten_fold(embeddings_a: np.ndarray, embeddings_b: np.ndarray, same: Sequence[bool] | np.ndarray,
             source: Path | str = "pairs") -> tuple[float, float]:
    """Accuracy over ten unshuffled folds: the threshold that is best on nine is applied to the tenth.

    A pair matches below a threshold on the squared Euclidean distance of the normalised embeddings; among equally
    good thresholds the lowest is taken.

    Args:
        embeddings_a, embeddings_b: [P, D], the two sides of each pair in the benchmark's order, each the sum of the
            image's embedding and its mirror image's, of any norm.
        same: [P], whether the pair shows one person.
        source: of the pairs, for the error.
    Returns:
        Mean and population standard deviation of the ten accuracies, in [0, 1].
    Raises:
        UserError: fewer than ten pairs, lengths that differ, or a row that is zero or not finite.
    """
    same = np.asarray(same, dtype=bool)
    if not len(embeddings_a) == len(embeddings_b) == len(same) >= FOLDS:
        raise UserError(f"{source}: {len(embeddings_a)} and {len(embeddings_b)} embeddings for {len(same)} pairs; give "
                        f"both sides of each pair, and at least {FOLDS} pairs")
    difference = unit_rows(embeddings_a, "first images") - unit_rows(embeddings_b, "second images")
    distance = np.square(difference).sum(axis=1)
    correct = (distance[:, None] < THRESHOLDS) == same[:, None]
    accuracies = []
    for nine, tenth in KFold(FOLDS).split(correct):
        best = correct[nine].mean(axis=0).argmax()
        accuracies.append(correct[tenth, best].mean())
    return float(np.mean(accuracies)), float(np.std(accuracies))


def mirror_sum(both: np.ndarray) -> np.ndarray:
    """[N, 2 D], embeddings of images and of their mirror images -> their sums [N, D]."""
    return both[:, : both.shape[1] // 2] + both[:, both.shape[1] // 2 :]


def read_lfw_pairs(file: Path | str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """LFW's pairs.txt (view 2: folds of matched, then mismatched pairs, in that order).

    Pairs of another number of folds are dealt into ten like these: a fold of one kind alone would shift the threshold of the
    others against it.

    Returns:
        The pairs as `<name>/<name>_<0001>`, without a suffix, and whether they match [P] bool.
    Raises:
        UserError: a malformed line, or not as many pairs as the first line says.
    """
    path = require_file(file, "LFW's pairs", "download pairs.txt of LFW's view 2")
    header, *lines = foreign_arrays.read_text(path, "pairs").splitlines() or [""]
    try:
        folds, per_fold = map(int, header.split())
    except ValueError:
        raise UserError(f"{path}: line 1 is not '<folds> <pairs>'; give pairs.txt of LFW's view 2") from None
    pairs, same = [], []
    for number, line in enumerate(lines, start=2):
        match line.split():
            case [name, i, j] if _is_lfw(name, i, j):
                pairs.append((_lfw_image(name, i), _lfw_image(name, j)))
                same.append(True)
            case [name_a, i, name_b, j] if _is_lfw(name_a, i, j) and _is_lfw(name_b, i, j):
                pairs.append((_lfw_image(name_a, i), _lfw_image(name_b, j)))
                same.append(False)
            case []:
                continue
            case _:
                raise UserError(f"{path}: line {number} is neither '<name> <i> <j>' nor '<name> <i> <name> <j>'; "
                                "download the file again")
    if not pairs or len(pairs) != folds * per_fold * 2 or sum(same) * 2 != len(same):
        raise UserError(f"{path}: holds {sum(same)} matched and {len(same) - sum(same)} mismatched pairs, line 1 says "
                        f"{folds} folds of {per_fold} each; download the file again")
    if folds == FOLDS:
        return pairs, np.array(same)
    kinds = [np.array_split(np.flatnonzero(np.equal(same, kind)), FOLDS) for kind in (True, False)]
    order = np.concatenate([part for fold in zip(*kinds, strict=True) for part in fold])
    return [pairs[number] for number in order], np.array(same)[order]


def read_bin(file: Path | str) -> tuple[list[bytes], np.ndarray]:
    """An insightface benchmark: a pickle of (encoded images, whether each pair matches), as Python 2 or 3 wrote it.

    Only lists, bytes, booleans and numpy arrays are unpickled; a file that asks for anything else is refused.

    Returns:
        2 P encoded images, of which 2 k and 2 k + 1 are a pair, and [P] bool.
    Raises:
        UserError: the file asks for something else, is damaged, or holds other than two images a pair.
    """
    path = require_file(file, "a .bin benchmark", "download it from insightface's model zoo")
    fix = "download it again from its publisher"
    with foreign_arrays.reading(path, "a .bin benchmark", fix):
        size = foreign_arrays.require_regular(path)
        stream = io.BytesIO(path.read_bytes())  # a file would take the memory that a length asks for before it reads
        foreign_arrays.scan(stream, size)
        stream.seek(0)
        try:
            content = foreign_arrays.Unpickler(stream, encoding="bytes").load()
        except foreign_arrays.CodeError as error:
            raise UserError(f"{path}: it asks to load {error}, which would run code, so it was not read; take a .bin of "
                            "insightface's model zoo") from None
        images, same = foreign_arrays.resolved(content, size)
        encoded = {id(image): _encoded(image) for image in images}
        images = [encoded[id(image)] for image in images]
        if not all(isinstance(value, bool | int | float | np.bool_ | np.number) and value in (0, 1) for value in same):
            raise ValueError("whether a pair matches is neither True nor False")
        same = np.array([bool(value) for value in same])
    if not len(same) or len(images) != 2 * len(same):
        raise UserError(f"{path}: holds {len(images)} images for {len(same)} pairs; {fix}")
    return images, same


def decode(encoded: bytes) -> np.ndarray:
    """An encoded benchmark image, uint8 [112, 112, 3] RGB. Raises UserError where it is none.

    OpenCV decodes it, as where the published figures were measured, but Pillow says first what it is and how large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as header:
            if header.size != (SIZE, SIZE):
                raise ValueError(header.size)
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    except Exception as error:  # whatever a damaged image makes of a decoder
        if is_out_of_memory(error):
            raise
        raise UserError(f"verify.bins: an image is damaged or not {SIZE} x {SIZE}; download the benchmarks again") from None


# ---- IJB-C -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class IJBCMeta:
    """IJB-C's three meta files: N images, and the pairs of templates to compare."""

    names: np.ndarray  # [N] str, file names in loose_crop/
    landmarks: np.ndarray  # [N, 5, 2] float32, pixels of the loose crop
    faceness: np.ndarray  # [N] float32, the detector's score
    template: np.ndarray  # [N] int64
    media: np.ndarray  # [N] int64
    p1: np.ndarray  # [pairs] int64, templates
    p2: np.ndarray  # [pairs] int64
    label: np.ndarray  # [pairs] int64, 1 for one person


def read_ijbc_meta(folder: Path | str) -> IJBCMeta:
    """Read ijbc_face_tid_mid.txt, ijbc_name_5pts_score.txt and ijbc_template_pair_label.txt of `folder`.

    Raises:
        UserError: a file is missing, a line is malformed (the first is named), or the files disagree.
    """
    folder = Path(folder)
    media_file, points_file, pairs_file = (
        folder / f"ijbc_{name}.txt" for name in ("face_tid_mid", "name_5pts_score", "template_pair_label"))
    media = _read_table(media_file, {"name": object, "template": np.int64, "media": np.int64})
    coordinates = {f"{axis}{k}": np.float32 for k in range(1, 6) for axis in "xy"}
    points = _read_table(points_file, {"name": object, **coordinates, "score": np.float32})
    pairs = _read_table(pairs_file, {"template": np.int64, "template_2": np.int64, "label": np.int64})
    if not np.array_equal(media["name"], points["name"]):
        raise UserError(f"{points_file}: does not list the images of {media_file.name} in the same order; take both "
                        "from one release")
    if not np.isin(pairs["label"], (0, 1)).all():
        raise UserError(f"{pairs_file}: a label is neither 0 nor 1; take the file from the release again")
    if len(np.unique(pairs["label"])) < 2:
        raise UserError(f"{pairs_file}: all its labels are equal; take the file from the release again")
    for unknown in np.setdiff1d(np.concatenate([pairs["template"], pairs["template_2"]]), media["template"])[:1]:
        raise UserError(f"{pairs_file}: names template {unknown}, which has no image in {media_file.name}; take both from one "
                        "release")
    landmarks = np.stack([points[name] for name in coordinates], axis=1).reshape(-1, 5, 2)
    _check_landmarks(points_file, points["name"], landmarks)
    if not np.isfinite(points["score"]).all():
        row = int(np.argmin(np.isfinite(points["score"])))
        raise UserError(f"{points_file}: the score of {points['name'][row]} is not finite; take the file from the release again")
    return IJBCMeta(media["name"].astype(str), landmarks, points["score"], media["template"], media["media"],
                    pairs["template"], pairs["template_2"], pairs["label"])


def ijb(features: np.ndarray, meta: IJBCMeta, far: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """IJB's 1:1 protocol: the cosines of pairs of templates, and TAR at FAR.

    An image's feature is faceness * (feature of the image + feature of its mirror image), not normalised; the mean
    within a media, the sum over a template's media.

    Args:
        features: [N, 2 D], of the image and of its mirror image; may be a memory map.
        far: the targets; TAR is that of the ROC curve's point whose FAR is nearest, of equally near the highest.
    Returns:
        score [pairs] float64 and tar [len(far)] float64.
    Raises:
        UserError: a feature is not finite, or a template's feature is zero.
    """
    templates, row = np.unique(meta.template, return_inverse=True)
    unit = torch.from_numpy(unit_rows(_template_features(features, meta.faceness, row, meta.media), "IJB templates"))
    first, second = (torch.from_numpy(np.searchsorted(templates, side)) for side in (meta.p1, meta.p2))
    score = torch.empty(len(first), dtype=unit.dtype)
    for start in tqdm(range(0, len(score), PAIR_BLOCK), desc="template pairs", unit="block", delay=1):
        block = slice(start, start + PAIR_BLOCK)
        score[block] = (unit[first[block]] * unit[second[block]]).sum(dim=1)
    score = score.numpy()
    # The published figures come from the curve's corners (drop_intermediate), whose FARs are not all FARs.
    fpr, tpr, _ = roc_curve(meta.label, score)
    tar = [tpr[::-1][np.argmin(np.abs(fpr[::-1] - target))] for target in far]
    return score, np.array(tar)


def _template_features(features: np.ndarray, faceness: np.ndarray, row: np.ndarray, media: np.ndarray) -> np.ndarray:
    """[templates, D]; the sum over media of the mean within a media is one weighted sum over a template's images."""
    _, group, sizes = np.unique(np.stack((row, media)), axis=1, return_inverse=True, return_counts=True)
    weight = np.asarray(faceness, dtype=np.float64) / sizes[group]
    half = features.shape[1] // 2
    total = torch.zeros(row.max() + 1, half, dtype=torch.float64)
    for start in range(0, len(features), IMAGE_BLOCK):
        block = slice(start, start + IMAGE_BLOCK)
        both = features[block, :half].astype(np.float64) + features[block, half:]
        total.index_add_(0, torch.from_numpy(row[block]), torch.from_numpy(weight[block, None] * both))
    return total.numpy()


# ---- pieces ----------------------------------------------------------------------------------------------------------

def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.tobytes()
    if not isinstance(image, bytes):
        raise TypeError(f"an image is of type {type(image).__name__}")
    return image


def _is_lfw(name: str, *numbers: str) -> bool:
    """Whether these are a person's folder and numbers of images there; nothing else may become part of a path."""
    return (re.fullmatch(r"[^./\\\0][^/\\\0]*", name) is not None
            and all(re.fullmatch(r"[0-9]{1,6}", number) for number in numbers))


def _lfw_image(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _read_table(file: Path, columns: dict[str, type]) -> np.ndarray:
    """A blank-separated text file as a structured array; a malformed line is named in the UserError."""
    path = require_file(file, "IJB-C's meta files", "give the folder meta/ of the release")
    foreign_arrays.require_regular(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is empty
            table = np.loadtxt(path, dtype=list(columns.items()), comments=None, ndmin=1, encoding="utf-8-sig")
    except ValueError:
        with open(path, encoding="utf-8-sig", errors="replace") as lines:
            number = next((k for k, line in enumerate(lines, start=1) if not _fits(line.split(), columns)), "?")
        raise UserError(f"{path}: line {number} is not '{' '.join(columns)}'; take the file from the release "
                        "again") from None
    if not table.size:
        raise UserError(f"{path}: is empty; take the file from the release again")
    return table


def _check_landmarks(file: Path, names: np.ndarray, landmarks: np.ndarray) -> None:
    """UserError where an image's landmarks [5, 2] of [N, 5, 2] are none of a face: what template.similarity_transform refuses."""
    with np.errstate(invalid="ignore"):  # infinite ones
        centred = landmarks.astype(np.float64) - landmarks.mean(axis=1, keepdims=True, dtype=np.float64)
    finite = np.isfinite(centred).all(axis=(1, 2))
    centred[~finite] = 0
    length, width = np.linalg.svd(centred, compute_uv=False).T
    mirrored = np.linalg.det((ARCFACE - ARCFACE.mean(axis=0)).T @ centred) < 0
    for reason, at_fault in (("are not finite", ~finite), ("coincide or lie on a line", width <= COLLINEAR * length),
                             ("are mirrored: left and right are exchanged", mirrored)):
        if at_fault.any():
            raise UserError(f"{file}: the landmarks of {names[int(np.argmax(at_fault))]} {reason}; take the file from the "
                            "release again, or remove that image's line from all meta files")


def _fits(values: list[str], columns: dict[str, type]) -> bool:
    try:
        return len(values) in (0, len(columns)) and all(kind is object or kind(value) is not None
                                                        for value, kind in zip(values, columns.values(), strict=False))
    except (ValueError, OverflowError):
        return False
