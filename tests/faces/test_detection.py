"""The detector's canvas, the faces it finds, the choice of one of them, and batches of images."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.drawn_face import draw_face, landmarks_at
from tests.faces.spots import centroids, spots
from utils.faces.detection import Canvas, Face, FaceBatches, FaceDetector, choose_landmarks, in_processes
from utils.faces.template import ARCFACE, LandmarkError

BOX = np.array([(15.0, 5.0), (97.0, 108.0)])  # about ARCFACE, as MTCNN draws it


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


# ---- batches ---------------------------------------------------------------------------------------------------------

def landmarks_alone(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    return landmarks


def test_batches_give_an_item_or_a_reason_for_each_image_in_order(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("face", "torn", "empty", "small")]
    for file, image in zip(files, (draw_face(250), draw_face(200), np.zeros((128, 128, 3), np.uint8), draw_face(64)),
                           strict=True):
        Image.fromarray(image).save(file)
    files[1].write_bytes(files[1].read_bytes()[:2000])
    work = FaceBatches([files[:2], files[2:]], landmarks_alone, 60 / 128, torch.device("cpu"))
    (face, torn), (empty, small) = in_processes(work, 1, torch.device("cpu"))
    for landmarks, size in ((face, 250), (small, 64)):
        assert np.abs(landmarks - landmarks_at(size)).max() < 0.03 * size
    assert empty == "no face found"
    assert torn.startswith("is not a readable image") and "torn.png: is" not in torn  # the list names the image already


def test_a_strip_is_not_enlarged(tmp_path):
    """Of 16 x 20,000 px the detector's canvas would take 0.25 GB, of a longer one all memory."""
    for name, size in (("strip", (16, 16 * 16 + 1)), ("band", (16, 16 * 16))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    work = FaceBatches([[tmp_path / "strip.png", tmp_path / "band.png"]], landmarks_alone, 60 / 128, torch.device("cpu"))
    assert list(in_processes(work, 1, torch.device("cpu"))) == [["is too thin to show a face", "no face found"]]


AFTER_OPENCVS_THREADS = """
import cv2, numpy as np, torch
from utils.faces.detection import in_processes
image = np.zeros((4000, 4000, 3), np.uint8)
cv2.warpAffine(image, np.eye(2, 3), (4000, 4000))  # in threads
class Work:
    def __len__(self): return 4
    def __getitem__(self, number): return [number]
print(list(in_processes(Work(), 2, torch.device("cpu"))))
"""


def test_workers_start_in_a_process_in_which_opencv_has_threads():
    done = subprocess.run([sys.executable, "-c", AFTER_OPENCVS_THREADS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[[0], [1], [2], [3]]\n"  # a worker waited for ever


@pytest.mark.parametrize("processes, batches, workers", [(1, 3, 0), (2, 3, 2), (8, 2, 2), (8, 1, 0)])
def test_worker_processes_are_as_many_as_there_is_work_for(processes, batches, workers):
    work = FaceBatches([[Path(f"{k}.png")] for k in range(batches)], landmarks_alone, 0.5, torch.device("cpu"))
    assert in_processes(work, processes, torch.device("cpu")).num_workers == workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("images, workers", [(192, 0), (1999, 0), (2000, 2), (3500, 3), (50_000, 4)])
def test_on_a_gpu_few_images_are_not_worth_another_process(images, workers, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    files = [Path(f"{k}.png") for k in range(images)]
    work = FaceBatches([files[k : k + 64] for k in range(0, images, 64)], landmarks_alone, 0.5, torch.device("cuda"))
    assert in_processes(work, 0, work.device).num_workers == workers
