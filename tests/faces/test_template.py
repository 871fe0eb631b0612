"""The warp, the choice of a face, the detector's canvas, and the lists beside the aligned faces."""
import numpy as np
import pytest

from tests.drawn_face import draw_face, landmarks_at
from utils.faces.template import (
    ARCFACE,
    CENTRE_FACE,
    TEMPLATES,
    Canvas,
    Face,
    FaceDetector,
    LandmarkError,
    centre_crop,
    choose_landmarks,
    keep,
    merge_failures,
    read_failures,
    read_kept,
    similarity_transform,
    warp,
    write_failures,
    write_kept,
)
from utils.runtime.errors import UserError

BOX = np.array([(15.0, 5.0), (97.0, 108.0)])  # about ARCFACE, as MTCNN draws it


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


def spots(places: np.ndarray, height: int, width: int, sigma: float) -> np.ndarray:
    """[H, W, 3] uint8: one bright round spot a channel, black elsewhere; `places` is [3, 2], px."""
    y, x = np.mgrid[:height, :width]
    squares = (x[..., None] - places[:, 0]) ** 2 + (y[..., None] - places[:, 1]) ** 2
    return np.round(255 * np.exp(-squares / (2 * sigma**2))).astype(np.uint8)


def centroids(image: np.ndarray) -> np.ndarray:
    """The centre of mass of each channel of [H, W, 3]: [3, 2], px."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    mass = image.astype(np.float64)
    return np.column_stack([(x[..., None] * mass).sum((0, 1)), (y[..., None] * mass).sum((0, 1))]) \
        / mass.sum((0, 1))[:, None]


# ---- the warp --------------------------------------------------------------------------------------------------------

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


# ---- detection -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, canvas, padding", [
    (64, 64, (256, 256), 48), (128, 128, (256, 256), 48), (112, 96, (288, 336), 48), (90, 200, (600, 270), 48),
    (250, 250, (250, 250), 0), (1003, 800, (266, 334), 0)])
def test_landmarks_come_back_from_the_canvas_exactly(height, width, canvas, padding):
    assert (Canvas(height, width).size, Canvas(height, width).padding) == (canvas, padding)
    places = np.array([(0.31, 0.42), (0.68, 0.43), (0.52, 0.61)]) * (width, height)
    image = spots(places, height, width, sigma=min(height, width) / 25)
    drawn = Canvas(height, width).draw(image)
    assert drawn.shape == (canvas[1] + 2 * padding, canvas[0] + 2 * padding, 3)
    found = Canvas(height, width).to_image(centroids(drawn))
    np.testing.assert_allclose(found, centroids(image), rtol=0, atol=2e-3 * max(1, height / 100))  # 8 bits


def test_the_canvas_is_padded_by_replication():
    drawn = Canvas(64, 64).draw(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert (drawn[:48] == drawn[48]).all() and (drawn[:, -48:] == drawn[:, -49:-48]).all()


@pytest.fixture(scope="module")
def detector():
    return FaceDetector(minimum_face=60 / 128)


def test_faces_of_all_sizes_are_found_where_they_are(detector):
    sizes = (48, 64, 128, 250, 1000)
    for size, faces in zip(sizes, detector([draw_face(size) for size in sizes]), strict=True):
        landmarks = choose_landmarks(faces, size, size)
        assert np.abs(landmarks - landmarks_at(size)).max() < 0.03 * size


def test_images_of_one_batch_may_differ_in_size_and_in_their_number_of_faces(detector):
    face, small, two = draw_face(250), draw_face(64), np.hstack([draw_face(250)] * 2)
    images = [face, np.zeros_like(face), small, two, draw_face(250, skin=(150, 110, 90)), np.zeros((9, 400, 3), np.uint8)]
    together = detector(images)
    assert [len(faces) for faces in together] == [1, 0, 1, 2, 1, 0]
    for image, faces in zip(images, together, strict=True):
        for one, other in zip(faces, detector([image])[0], strict=True):
            np.testing.assert_allclose(one.landmarks, other.landmarks, rtol=0, atol=1e-3)
            np.testing.assert_allclose(one.box, other.box, rtol=0, atol=1e-3)


def test_the_minimum_face_is_a_part_of_the_image():
    image = np.full((250, 250, 3), 120, np.uint8)
    image[70:170, 70:170] = draw_face(100)  # its face is about 57 px high
    assert len(FaceDetector(minimum_face=0.15)([image])[0]) == 1
    assert len(FaceDetector(minimum_face=0.60)([image])[0]) == 0


# ---- the choice of a face --------------------------------------------------------------------------------------------

def face(scale: float = 1.0, shift: tuple[float, float] = (0, 0), landmarks: np.ndarray = ARCFACE) -> Face:
    return Face(BOX * scale + shift, landmarks * scale + shift)


def test_the_largest_plausible_face_is_chosen():
    small, large = face(1.0), face(1.5, (100, 50))
    mirrored = Face(BOX * 2, (ARCFACE * (-1, 1) + (112, 0)) * 2)
    np.testing.assert_array_equal(choose_landmarks([small, mirrored, large], 400, 400), large.landmarks)


def test_a_face_cut_by_the_border_is_as_large_as_what_shows_of_it():
    whole, cut = face(1.0, (100, 100)), face(1.15, (-43, 0))
    assert (cut.landmarks > 0).all()
    np.testing.assert_array_equal(choose_landmarks([cut, whole], 300, 300), whole.landmarks)


@pytest.mark.parametrize("faces, reason", [
    ([], "no face found"),
    ([face(landmarks=ARCFACE * (-1, 1) + (112, 0))], "mirrored"),
    ([face(landmarks=ARCFACE[[1, 0, 2, 3, 4]])], "mirrored"),
    ([face(landmarks=ARCFACE[[0, 1, 2, 4, 3]])], "not arranged as a face's"),
    ([face(landmarks=np.linspace((30, 40), (80, 90), 5))], "lie on a line"),
    ([Face(BOX, ARCFACE + (60, 0))], "far outside the face's box"),
    ([face(shift=(-50, 0))], "outside the image"),
    ([face(shift=(0, 140))], "outside the image"),
], ids=["none", "mirrored", "eyes swapped", "mouth swapped", "a line", "off the box", "off to the left", "off below"])
def test_impossible_faces_are_refused_with_the_reason(faces, reason):
    with pytest.raises(LandmarkError, match=reason):
        choose_landmarks(faces, 200, 200)


def test_a_head_turned_far_is_still_a_face():
    depth = np.array([0, 0, 25, 5, 5])  # px of the template: the nose stands out
    turned = ARCFACE * (np.cos(np.radians(70)), 1) + np.column_stack([depth * np.sin(np.radians(70)), np.zeros(5)])
    np.testing.assert_array_equal(choose_landmarks([Face(BOX, turned)], 112, 112), turned)


# ---- the lists -------------------------------------------------------------------------------------------------------

def test_failures_of_all_ranks_and_of_killed_runs_come_together(tmp_path):
    write_failures(tmp_path, {("b", "1.png"): "no face found"})
    write_failures(tmp_path, {("a", 'ü, "2".png'): "landmarks are mirrored"}, rank=0)
    write_failures(tmp_path, {("c", "3\u2028.png"): "x: is not readable"}, rank=7)
    expected = {("a", 'ü, "2".png'): "landmarks are mirrored", ("b", "1.png"): "no face found",
                ("c", "3\u2028.png"): "x: is not readable"}
    assert merge_failures(tmp_path) == expected and read_failures(tmp_path / "failures.csv") == expected
    assert [file.name for file in tmp_path.iterdir()] == ["failures.csv"]


def test_kept_are_the_first_images_of_the_first_identities_with_enough(tmp_path):
    faces = {name: [tmp_path / name / f"{k}.png" for k in range(number)]
             for name, number in {"a": 3, "b": 2, "c": 0, "d": 5, "e": 3}.items()}
    kept = keep(faces, identities=2, images=3)
    assert kept == {"a": faces["a"], "d": faces["d"][:3]}
    assert list(keep(faces, identities=0, images=2)) == ["a", "b", "d", "e"]
    write_kept(tmp_path, kept)
    assert read_kept(tmp_path) == kept


@pytest.mark.parametrize("text, words", [
    (None, "no such file.*run align.py"), ("", "is damaged"), ("identity,image\na\n", "is damaged"),
    ("identity,picture\na,b\n", "is damaged"), ("identity,image\n", "lower align.keep_images")])
def test_a_missing_damaged_or_empty_selection_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "kept.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_kept(tmp_path)
