"""The five-point transform, the warp and the centre crop."""
import numpy as np
import pytest

from tests.faces.spots import centroids, spots
from utils.faces.template import ARCFACE, CENTRE_FACE, TEMPLATES, LandmarkError, centre_crop, similarity_transform, warp


def least_squares_similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[[a, -b, s], [b, a, t]] by the linear least squares in a, b, s, t."""
    zero, one = np.zeros(len(x)), np.ones(len(x))
    A = np.concatenate([np.column_stack([x[:, 0], -x[:, 1], one, zero]), np.column_stack([x[:, 1], x[:, 0], zero, one])])
    a, b, s, t = np.linalg.lstsq(A, np.concatenate([y[:, 0], y[:, 1]]), rcond=None)[0]
    return np.array([(a, -b, s), (b, a, t)])


def moved(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    angle = np.radians(degrees)
    rotation = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    return scale * points @ rotation.T + shift


def test_templates_are_the_published_ones():
    assert TEMPLATES["arcface"].tolist() == [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                                             [41.5493, 92.3655], [70.7299, 92.2041]]
    shifted = [[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]]
    np.testing.assert_allclose(TEMPLATES["arcface_shifted"], shifted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_similarity_transform_equals_the_closed_form_least_squares(template):
    random = np.random.default_rng(0)
    for _ in range(200):
        landmarks = moved(ARCFACE + random.normal(0, 5, (5, 2)), random.uniform(-180, 180), random.uniform(0.1, 20),
                          random.uniform(-1000, 1000, 2))
        M = similarity_transform(landmarks, template)
        assert M.dtype == np.float64
        np.testing.assert_allclose(M, least_squares_similarity(landmarks, template), rtol=0, atol=1e-6)


def test_similarity_transform_takes_float32_landmarks_in_double_precision():
    landmarks = moved(ARCFACE, 20, 3, (2000, 3000)).astype(np.float32)
    np.testing.assert_allclose(similarity_transform(landmarks, ARCFACE), least_squares_similarity(
        landmarks.astype(np.float64), ARCFACE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("landmarks, reason", [
    (ARCFACE * (-1, 1), "mirrored"),
    (ARCFACE * (1, -1), "mirrored"),
    (ARCFACE[[1, 0, 2, 4, 3]], "mirrored"),
    (np.full((5, 2), 40.0), "coincide or lie on a line"),
    (np.outer(np.arange(5), (3.0, 7.0)) + 0.1, "coincide or lie on a line"),
    (np.where(np.arange(10).reshape(5, 2) == 3, np.nan, ARCFACE), "not finite"),
    (np.where(np.arange(10).reshape(5, 2) == 3, np.inf, ARCFACE), "not finite"),
], ids=["left-right", "upside-down mirror", "sides swapped", "one point", "a line", "nan", "infinite"])
def test_mirrored_and_degenerate_landmarks_are_refused(landmarks, reason):
    with pytest.raises(LandmarkError, match=reason):
        similarity_transform(landmarks, ARCFACE)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_warp_brings_landmarks_onto_the_template(template):
    landmarks = moved(ARCFACE, -25, 1.7, (60, 130))
    face = warp(spots(landmarks[[0, 2, 4]], 400, 300, sigma=5), landmarks, template)
    assert face.shape == (112, 112, 3) and face.dtype == np.uint8
    np.testing.assert_allclose(centroids(face), template[[0, 2, 4]], rtol=0, atol=0.05)


def test_warp_is_black_where_the_image_ends():
    face = warp(np.full((112, 112, 3), 200, np.uint8), ARCFACE - (30, 0), ARCFACE)
    assert (face[:, :29] == 0).all() and (face[:, 31:] == 200).all()


@pytest.mark.parametrize("size", [250, 500])
def test_centre_crop_takes_the_mean_face_whatever_the_size(size):
    mean_face = CENTRE_FACE * size - 0.5
    face = centre_crop(spots(mean_face[[0, 2, 4]], size, size, sigma=size / 60), TEMPLATES["arcface"])
    assert np.linalg.norm(centroids(face) - ARCFACE[[0, 2, 4]], axis=1).max() < 1.7  # LFW's mean face is 1.6 px off
