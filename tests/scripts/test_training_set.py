"""experiments/training_set.py: who is left out, on embeddings made up, and end to end on drawn faces."""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from experiments import training_set
from tests.drawn_face import draw_face, landmarks_at
from utils.identities.contexts import normalise
from utils.training import faces as training_faces


def cluster(centres: np.ndarray, spread: float, seed: int) -> np.ndarray:
    return normalise(centres + spread * np.random.default_rng(seed).standard_normal(centres.shape))


def test_the_threshold_is_that_of_the_fmr(monkeypatch):
    monkeypatch.setattr(training_set, "FMR", 0.01)
    labels = np.repeat(np.arange(20), 6)
    centres = normalise(np.random.default_rng(0).standard_normal((20, 16)))
    embeddings = cluster(centres[labels], 0.15, 1)
    threshold, found = training_set.similarity_threshold(embeddings, labels)
    impostors, own = [], []
    for row, label in enumerate(labels):
        for other in range(20):
            members = np.flatnonzero((labels == other) & (np.arange(120) != row))
            mean = embeddings[members].mean(axis=0)
            (own if other == label else impostors).append(embeddings[row] @ mean / np.linalg.norm(mean))
    assert np.mean(np.array(impostors) >= threshold) == pytest.approx(0.01, abs=0.001)
    assert found == pytest.approx(np.mean(np.array(own) >= threshold), abs=1e-9)


def test_whoever_resembles_somebody_in_any_image_is_left_out():
    centres = np.eye(8)
    labels = np.array([0, 0, 1, 1, 2, 3, 3])
    embeddings = cluster(centres[labels], 0.01, 0)
    embeddings[3] = centres[7]  # one image of 1 is of somebody in the test set
    faces = training_faces.TrainingFaces([Path(f"{row}.png") for row in range(7)], labels, list("abcd"), None, "digest")
    is_cut = np.array([True, True, False, False, True, True, False])
    probes = {"test set: x": np.stack([centres[7], centres[7]]), "a": embeddings[:2]}
    found = training_set.whom_to_leave_out(faces, embeddings, is_cut, np.array([0]), probes, 0.8)
    assert found == {1: ("similar", "3.png", "test set: x", "1.000"), 2: ("cut", "4.png", "", "")}


def test_a_crop_lies_outside_as_far_as_the_face_is_near_the_border():
    landmarks = landmarks_at(200)
    whole = training_faces.part_outside(landmarks, 200, 200, 12)
    moved = training_faces.part_outside(landmarks - (0, landmarks[:2, 1].mean() + 1), 200, 200, 12)
    assert whole < 0.02 and 0.35 < moved < 0.6  # eyes at the upper border: they lie at 46% of a crop's height


def test_a_photograph_on_its_side_is_as_large_as_it_is_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored 400 x 200, seen 200 x 400
    Image.new("RGB", (400, 200)).save(tmp_path / "side.jpg", exif=exif)
    landmarks = landmarks_at(200) + (0, 200)  # in its lower half
    faces = training_faces.TrainingFaces([tmp_path / "side.jpg"], np.array([0]), ["a"], landmarks[None], "", set())
    assert not training_set.are_cut(faces).any()


@pytest.mark.slow
def test_from_folders_to_lists_that_the_training_takes(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for name in [f"lfw/p{k}/0.png" for k in range(8)] + [f"chips/{k:02d}.png" for k in range(30)] + \
            [f"test/t{k}/{j}.png" for k in range(3) for j in range(2)]:
        face = draw_face(120, skin=tuple(generator.integers(120, 240, 3).tolist()))
        if name.startswith("chips"):
            face = face[30:95, 30:90]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face).save(tmp_path / name)
    (tmp_path / "chips_labels.csv").write_text("number,age,sex,ethnicity\n" + "".join(
        f"{k:02d},{20 + k},{('male', 'female')[k % 2]},{('x', 'y')[k // 15]}\n" for k in range(30)))

    class Colours(torch.nn.Module):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(faces, 4).flatten(1)

    (tmp_path / "recogniser.pth").write_bytes(b"1")
    monkeypatch.setattr(training_set, "load_backbone", lambda file: Colours())
    monkeypatch.setattr(training_set, "similarity_threshold", lambda embeddings, labels: (1.1, 1.0))
    monkeypatch.setattr(sys, "argv", [
        "x", f"training.faces={tmp_path}/lfw,{tmp_path}/chips", f"contexts.faces={tmp_path}/test", "device=cpu",
        f"contexts.recogniser={tmp_path}/recogniser.pth", f"paths.output={tmp_path}/o", "align.minimum_face=30"])
    training_set.main()
    folder = tmp_path / "o" / "training_set"
    with open(folder / "left_out.csv", encoding="utf-8", newline="") as file:
        assert {row["reason"] for row in csv.DictReader(file)} == {"cut"}
    assert (folder / "held_out.txt").read_text() == "p0\np4\n"  # nobody of the chips is left, so that names need no folder
    assert (folder / "leave_out.txt").read_text() == ""
    shown = capsys.readouterr().out
    assert f"training.faces={tmp_path}/lfw training.leave_out" in shown
    assert "| lfw | 8 | 8 | 2 | 0 | 0 | 6 | 6 |" in shown and "| sex: female | 50.0% |" in shown
