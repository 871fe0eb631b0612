"""Five-point alignment: MTCNN's landmarks, a least-squares similarity transform, a 112 x 112 crop.

Coordinates are (x, y) in pixels, x to the right and y down; (0, 0) is the centre of the first pixel. The order of the
five landmarks is left eye, right eye, nose, left and right corner of the mouth, left as seen in the image.
"""
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from facenet_pytorch import MTCNN

from utils.faces.folders import SIZE, select
from utils.runtime.errors import UserError
from utils.runtime.files import require_file, write_csv

ARCFACE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
TEMPLATES = {
    "arcface": ARCFACE,  # of the benchmarks
    "arcface_shifted": ARCFACE - (8, 0),  # of the published training crops
}
# The mean landmarks of deep-funnelled LFW, measured on the 13,052 of its faces that lie in the middle, as parts of the
# image's width and height.
CENTRE_FACE = np.array([(0.4220, 0.4555), (0.5905, 0.4517), (0.5074, 0.5524), (0.4351, 0.6403), (0.5840, 0.6369)])

FAILURE_COLUMNS = ("identity", "image", "reason")
KEPT_COLUMNS = ("identity", "image")

# Landmarks thinner than this part of their length lie on a line; the thinnest of LFW's 13,233 faces has 0.34.
COLLINEAR = 1e-3
# How far landmarks may be from the template's shape: px of 112, root mean square. LFW's farthest is 11.1, a head turned
# by 75 degrees is at 13.7, and two swapped corners of the mouth are at 16.9.
MAX_RESIDUAL = 14.0
# How far outside the detector's box landmarks may lie, as a part of the box; 0.13 on LFW.
BOX_MARGIN = 0.25

# What the detector looks at: see Canvas.
CANVAS_SIDE = 256  # px
CANVAS_PADDING = 48  # px
ONET_SIZE = 48  # px
LOOKS = ((0, 0, 0.95), (-0.04, -0.04, 1.0), (0.04, 0.04, 1.0), (0.04, -0.04, 1.1), (-0.04, 0.04, 1.1))  # see `view`
# MTCNN cuts its squares to whole pixels, which shifts its landmarks by so much to the right and down, in px of the
# canvas (measured on LFW by mirroring and by turning images by 15 degrees). Recognisers learnt from faces aligned by
# MTCNN's landmarks as they are, so the shift stays.
MTCNN_SHIFT = 1.2
MIRRORED = (1, 0, 2, 4, 3)  # a mirror image's landmarks in the order of the image's own
SMALLEST_SIDE = 16  # px; nothing smaller can show a face, and thin strips would be enlarged without end


class LandmarkError(ValueError):
    """There is no face, or the landmarks cannot be a face's; the message is the reason."""


# ---- the warp --------------------------------------------------------------------------------------------------------

def similarity_transform(landmarks: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that take `landmarks` to `template` with the least squares (Umeyama 1991, eq. 40-42).

    Args:
        landmarks, template: [5, 2], px.
    Returns:
        [2, 3] float64, as cv2.warpAffine takes it: template ~ M @ (x, y, 1).
    Raises:
        LandmarkError: the landmarks are not finite, coincide, lie on a line, or are mirrored.
    """
    x, y = np.asarray(landmarks, dtype=np.float64), np.asarray(template, dtype=np.float64)
    if not np.isfinite(x).all():
        raise LandmarkError("landmarks are not finite")
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    length, width = np.linalg.svd(x - mean_x, compute_uv=False)
    if width <= COLLINEAR * length:
        raise LandmarkError("landmarks coincide or lie on a line")
    covariance = (y - mean_y).T @ (x - mean_x) / len(x)
    U, D, Vt = np.linalg.svd(covariance)
    R = U @ Vt
    if np.linalg.det(R) < 0:
        raise LandmarkError("landmarks are mirrored")
    c = D.sum() / (x - mean_x).var(axis=0).sum()
    return np.column_stack([c * R, mean_y - c * R @ mean_x])


def warp(image: np.ndarray, landmarks: np.ndarray, template: np.ndarray, size: int = SIZE) -> np.ndarray:
    """The face with its landmarks on the template; bicubic, black where the image ends.

    Bicubic keeps more of a face's detail than bilinear: of LFW's 6,000 pairs MobileFaceNet then gets 8 more right.

    Args:
        image: [H, W, 3] uint8 RGB.
        landmarks: [5, 2], px of the image.
        template: [5, 2], px of the crop.
    Returns:
        [size, size, 3] uint8 RGB.
    Raises:
        LandmarkError: as similarity_transform.
    """
    return cv2.warpAffine(image, similarity_transform(landmarks, template), (size, size), flags=cv2.INTER_CUBIC)


def centre_crop(image: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The crop for a funnelled image whose face was not detected: where LFW's mean face lies, onto the template.

    On the unshifted template and a 250 x 250 image of LFW this is a square of 132 px around (126, 117).

    Args:
        image: [H, W, 3] uint8 RGB, a face in its middle.
        template: [5, 2], px of the crop.
    Returns:
        [112, 112, 3] uint8 RGB.
    """
    height, width = image.shape[:2]
    return warp(image, CENTRE_FACE * (width, height) - 0.5, template)


# ---- detection -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Face:
    """A detected face: `box` [2, 2], its corners of least and largest x and y, and `landmarks` [5, 2]; px."""

    box: np.ndarray
    landmarks: np.ndarray


class Canvas:
    """What the detector sees of an image, and the way back.

    Images are brought to a shorter side near 256 px by a whole factor: 64 px is enlarged x 4, 128 px x 2, 250 px stays,
    1000 px is shrunk to a quarter. Small images are mostly crops whose face touches the border, where MTCNN finds
    it badly: what is enlarged is also padded, by replication.
    """

    def __init__(self, height: int, width: int) -> None:
        shorter = min(height, width)
        enlarge = max(1, round(CANVAS_SIDE / shorter))
        shrink = max(1, round(shorter / CANVAS_SIDE))
        self.size = (width * enlarge // shrink, height * enlarge // shrink)
        self.scale = np.array(self.size) / (width, height)
        self.padding = CANVAS_PADDING if enlarge > 1 else 0
        self.shorter_side = min(self.size)

    def draw(self, image: np.ndarray) -> np.ndarray:
        shrinks = self.scale[0] < 1
        canvas = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return cv2.copyMakeBorder(canvas, *[self.padding] * 4, cv2.BORDER_REPLICATE)

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the canvas, px, in px of the image: pixel centres go to pixel centres."""
        return (points - self.padding + 0.5) / self.scale - 0.5


class FaceDetector:
    """MTCNN (Zhang et al. 2016) of facenet-pytorch, with its own thresholds, and its landmarks located once more.

    One look of MTCNN's last stage, the O-Net, leaves each landmark uncertain by about a pixel. It therefore looks again,
    at slightly different squares around the box that was found and at their mirror images, and the mean is taken.

    Args:
        minimum_face: the smallest face to look for, as a part of the image's shorter side; in (0, 1).
    """

    def __init__(self, minimum_face: float, device: torch.device | str = "cpu") -> None:
        self.minimum_face = minimum_face
        self.mtcnn = MTCNN(device=torch.device(device))

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
        """The faces of each image ([H, W, 3] uint8 RGB, of any sizes; those of one size are one batch)."""
        faces: list[list[Face]] = [[] for _ in images]
        by_size = defaultdict(list)
        for index, image in enumerate(images):
            if min(image.shape[:2]) >= SMALLEST_SIDE:
                by_size[image.shape[:2]].append(index)
        for size, indices in by_size.items():
            canvas = Canvas(*size)
            self.mtcnn.min_face_size = self.minimum_face * canvas.shorter_side
            batch = np.stack([canvas.draw(images[index]) for index in indices])
            # MTCNN.forward fails under numpy >= 1.24 where images differ in their number of faces; detect does not.
            boxes, _, points = self.mtcnn.detect(batch, landmarks=True)
            for index, boxes_of_image, points_of_image in zip(indices, boxes, points, strict=True):
                if boxes_of_image is not None:
                    corners = canvas.to_image(np.asarray(boxes_of_image, dtype=np.float64).reshape(-1, 2, 2))
                    landmarks = canvas.to_image(np.asarray(points_of_image, dtype=np.float64))
                    faces[index] = [Face(*face) for face in zip(corners, landmarks, strict=True)]
        return self._located_again(images, faces)

    @torch.inference_mode()
    def _located_again(self, images: Sequence[np.ndarray], faces: list[list[Face]]) -> list[list[Face]]:
        looks = [(image, view(face.box, *look)) for image, found in zip(images, faces, strict=True)
                 for face in found for look in LOOKS]
        if not looks:
            return faces
        crops = torch.from_numpy(np.stack([crop_square(image, *square) for image, square in looks]))
        crops = (crops.to(self.mtcnn.device).permute(0, 3, 1, 2).float() - 127.5) / 128
        # The O-Net gives five x, then five y, as parts of its square.
        straight, mirrored = (self.mtcnn.onet(x)[1].view(-1, 2, 5).mT.cpu().double().numpy()
                              for x in (crops, crops.flip(3)))
        parts = (straight + ((1, 0) + mirrored * (-1, 1))[:, MIRRORED]) / 2
        points = [corner + side * part for (_, (corner, side)), part in zip(looks, parts, strict=True)]
        means = iter(np.array(points).reshape(-1, len(LOOKS), 5, 2).mean(axis=1))
        return [[Face(face.box, next(means) + MTCNN_SHIFT / Canvas(*image.shape[:2]).scale) for face in found]
                for image, found in zip(images, faces, strict=True)]


def view(box: np.ndarray, x: float, y: float, size: float) -> tuple[np.ndarray, float]:
    """The square around a box, moved by parts of its side and resized: its upper left corner (x, y) and side, px."""
    side = (box[1] - box[0]).max()
    return box.mean(axis=0) + side * (np.array((x, y)) - size / 2), side * size


def crop_square(image: np.ndarray, corner: np.ndarray, side: float) -> np.ndarray:
    """A square of an image, not rounded to whole pixels, as the O-Net sees it: [48, 48, 3] uint8 RGB."""
    shrink = max(1, round(side / ONET_SIZE))
    step = side / (ONET_SIZE * shrink)
    x, y = corner + step / 2
    square = cv2.warpAffine(image, np.array([(step, 0, x), (0, step, y)]), (ONET_SIZE * shrink, ONET_SIZE * shrink),
                            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(square, (ONET_SIZE, ONET_SIZE), interpolation=cv2.INTER_AREA)


def choose_landmarks(faces: Sequence[Face], height: int, width: int) -> np.ndarray:
    """The landmarks [5, 2] of the largest plausible face of an image.

    Large is what shows of a face's box: somebody at the border, cut in half, is not who the picture is of. Nor, of two
    people of about one size, is the one aside: twice the squared distance from the middle counts against a face.

    Raises:
        LandmarkError: there is no face, or none of them is plausible; the reason is that of the largest.
    """
    if not faces:
        raise LandmarkError("no face found")
    refused = []
    for face in sorted(faces, key=lambda face: _prominence(face, height, width), reverse=True):
        try:
            check_plausible(face, height, width)
            return face.landmarks
        except LandmarkError as error:
            refused.append(str(error))
    raise LandmarkError(refused[0])


def check_plausible(face: Face, height: int, width: int) -> None:
    """Refuse landmarks that cannot be a face's in an image of this height and width, px.

    Raises:
        LandmarkError: they are not finite, degenerate, mirrored, far outside the face's box, outside the image, or in
            an arrangement that no face takes.
    """
    landmarks = face.landmarks
    M = similarity_transform(landmarks, ARCFACE)
    lowest, highest = face.box
    margin = BOX_MARGIN * (highest - lowest)
    if (landmarks < lowest - margin).any() or (landmarks > highest + margin).any():
        raise LandmarkError("landmarks lie far outside the face's box")
    if (landmarks < -0.5).any() or (landmarks > (width - 0.5, height - 0.5)).any():
        raise LandmarkError("landmarks lie outside the image")
    residual = np.sqrt(((landmarks @ M[:, :2].T + M[:, 2] - ARCFACE) ** 2).sum(axis=1).mean())
    if residual > MAX_RESIDUAL:
        raise LandmarkError(f"landmarks are not arranged as a face's ({residual:.1f} px of {SIZE} from the template)")


def _prominence(face: Face, height: int, width: int) -> float:
    lowest, highest = face.box
    shown = np.minimum(highest, (width - 0.5, height - 0.5)) - np.maximum(lowest, -0.5)
    aside = face.box.mean(axis=0) - ((width - 1) / 2, (height - 1) / 2)
    return float(np.clip(shown, 0, None).prod() - 2 * (aside**2).sum())


# ---- the folder of aligned faces -------------------------------------------------------------------------------------

Failures = Mapping[tuple[str, str], str]  # (identity, image) -> reason


def write_failures(aligned: Path, failures: Failures, rank: int | None = None) -> None:
    """Write failures.csv or, given a rank, what failed in that process alone, for merge_failures."""
    name = "failures.csv" if rank is None else f"failures.rank{rank}.csv"
    write_csv(aligned / name, FAILURE_COLUMNS, [(*image, reason) for image, reason in sorted(failures.items())])


def read_failures(file: Path) -> dict[tuple[str, str], str]:
    """Raises UserError where the file is not one that write_failures made."""
    return {(identity, image): reason for identity, image, reason in _read_rows(file, FAILURE_COLUMNS)}


def merge_failures(aligned: Path) -> dict[tuple[str, str], str]:
    """Bring what failed in all ranks, of this run and of killed ones, together in failures.csv, and return it."""
    merged, parts = aligned / "failures.csv", sorted(aligned.glob("failures.rank*.csv"))
    failures = read_failures(merged) if merged.is_file() else {}
    for part in parts:
        failures |= read_failures(part)
    write_failures(aligned, failures)
    for part in parts:
        part.unlink()
    return failures


def keep(faces: Mapping[str, Sequence[Path]], identities: int, images: int) -> dict[str, list[Path]]:
    """The first `images` faces of each of the first `identities` identities that have so many; 0: all of them."""
    return select({name: files for name, files in faces.items() if len(files) >= max(images, 1)}, identities, images)


def write_kept(aligned: Path, kept: Mapping[str, Sequence[Path]]) -> None:
    """Write the kept selection: kept.csv in the folder of aligned faces."""
    write_csv(aligned / "kept.csv", KEPT_COLUMNS, [(name, file.name) for name, files in kept.items() for file in files])


def read_kept(aligned: Path) -> dict[str, list[Path]]:
    """The kept selection of a folder of aligned faces: identity -> its images, in the order they were kept.

    Raises:
        UserError: kept.csv is missing or damaged, or nothing was kept.
    """
    kept: dict[str, list[Path]] = {}
    for identity, image in _read_rows(aligned / "kept.csv", KEPT_COLUMNS):
        kept.setdefault(identity, []).append(aligned / identity / image)
    if not kept:
        raise UserError(f"{aligned / 'kept.csv'}: no identity had enough faces; lower align.keep_images and run align.py "
                        "again")
    return kept


def _read_rows(file: Path, columns: Sequence[str]) -> list[list[str]]:
    require_file(file, "aligned faces", "run align.py")
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            header, *rows = csv.reader(opened)
        if header != list(columns) or any(len(row) != len(columns) for row in rows):
            raise ValueError(f"its columns should be {', '.join(columns)}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: is damaged ({error}); delete it and run align.py again") from None
    return rows
