"""Five-point alignment: landmarks onto the recognisers' template, 112 x 112, by a least-squares similarity transform.

Coordinates are (x, y) in pixels, x to the right and y down; (0, 0) is the centre of the first pixel. The order of the
five landmarks is left eye, right eye, nose, left and right corner of the mouth, left as seen in the image.
"""
import cv2
import numpy as np

SIZE = 112  # px, height and width of an aligned face
ARCFACE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
TEMPLATES = {
    "arcface": ARCFACE,  # of the benchmarks
    "arcface_shifted": ARCFACE - (8, 0),  # of the published training crops
}
# The mean landmarks of deep-funnelled LFW, measured on the 13,052 of its faces that lie in the middle, as parts of the
# image's width and height.
CENTRE_FACE = np.array([(0.4220, 0.4555), (0.5905, 0.4517), (0.5074, 0.5524), (0.4351, 0.6403), (0.5840, 0.6369)])

# Landmarks thinner than this part of their length lie on a line; the thinnest of LFW's 13,233 faces has 0.34.
COLLINEAR = 1e-3

class LandmarkError(ValueError):
    """There is no face, or the landmarks cannot be a face's; the message is the reason."""


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
