"""Cutting faces out for training."""
import numpy as np
import pytest
import torch
from PIL import Image

from tests.drawn_face import draw_face, landmarks_at
from utils.faces.template import ARCFACE, warp
from utils.recognition.recogniser_training import faces as training_faces
from utils.runtime.errors import UserError

CPU = torch.device("cpu")


def whole_faces(folder, names) -> training_faces.TrainingFaces:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    return training_faces.find(training_faces.image_folders(folder), folder / "cache", True, 0.5, CPU)


@pytest.mark.parametrize("size, side", [(64, 250), (64, 600), (128, 200)])
def test_a_crop_shows_the_recognisers_canvas_and_a_margin(size, side):
    image, landmarks = draw_face(side), landmarks_at(side)
    crop = training_faces.crop(image, landmarks, size, 12)
    assert crop.shape == (size, size, 3)
    tensor = torch.from_numpy(crop).permute(2, 0, 1)[None].float()
    canvas = training_faces.of_canvas(tensor, 12)[0].permute(1, 2, 0).numpy()
    direct = warp(image, landmarks, ARCFACE).astype(float)
    inner = (slice(4, -4),) * 2
    # a shift of half a pixel would be seen: it alone makes a difference of 2 to 3 grey levels here
    assert np.abs(canvas - direct)[inner].mean() < (2.0 if size == 64 else 1.0)
    shifted = np.roll(direct, 1, axis=1)
    assert np.abs(canvas - shifted)[inner].mean() > 1.3 * np.abs(canvas - direct)[inner].mean()


def test_whole_images_give_their_middle_square():
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, 10:40] = 200
    assert (training_faces.crop(image, None, 16, 12) == 200).all()


def test_a_flat_folder_has_a_person_in_each_image(tmp_path):
    faces = whole_faces(tmp_path / "flat", ["b.png", "a.png", "c.jpg"])
    assert faces.identities == ["a.png", "b.png", "c.jpg"] and faces.labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="no such folder"):
        training_faces.image_folders(tmp_path / "absent")


def test_what_was_cut_out_is_kept_until_the_images_change(tmp_path):
    faces = whole_faces(tmp_path / "f", ["A/0.png", "A/1.png", "B/0.png"])
    cache = tmp_path / "cache"
    first = training_faces.crops(faces, cache, 16, 0)
    assert first.shape == (3, 16, 16, 3) and faces.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(first[2], training_faces.crop(np.asarray(Image.open(faces.files[2])), None, 16, 0))
    (tmp_path / "f" / "B" / "0.png").rename(tmp_path / "f" / "B" / "9.png")  # a cached array needs no image
    training_faces.crops(faces, cache, 16, 0)
    (tmp_path / "f" / "B" / "9.png").rename(tmp_path / "f" / "B" / "0.png")
    changed = whole_faces(tmp_path / "f", ["C/0.png"])
    assert changed.digest != faces.digest
    assert len(training_faces.crops(changed, cache, 16, 0)) == 4


def test_images_beside_folders_are_refused(tmp_path):
    whole_faces(tmp_path / "f", ["A/0.png"])
    Image.new("RGB", (20, 20)).save(tmp_path / "f" / "stray.png")
    with pytest.raises(UserError, match="holds images, stray.png for one, and folders"):
        training_faces.image_folders(tmp_path / "f")


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "f" / "A"
    folder.mkdir(parents=True)
    for k in range(5):
        Image.fromarray(draw_face(100 + 8 * k)).save(folder / f"{k}.png")
    folders = training_faces.image_folders(folder.parent)
    monkeypatch.setattr(training_faces, "BATCH", 2)
    monkeypatch.setattr(training_faces, "SAVE_SECONDS", -1)
    searched, in_processes = [], training_faces.in_processes

    def killed(work, processes, device):
        searched.append(len(work))
        for number, results in enumerate(in_processes(work, 1, device)):
            if len(searched) == 1 and number == 1:
                raise KeyboardInterrupt
            yield results
    monkeypatch.setattr(training_faces, "in_processes", killed)
    with pytest.raises(KeyboardInterrupt):
        training_faces.find(folders, tmp_path / "cache", False, 0.5, CPU)
    faces = training_faces.find(folders, tmp_path / "cache", False, 0.5, CPU)
    assert searched == [3, 2]
    for k, landmarks in enumerate(faces.landmarks):
        assert np.abs(landmarks - landmarks_at(100 + 8 * k)).max() < 4
    training_faces.find(folders, tmp_path / "cache", False, 0.5, CPU)
    assert searched == [3, 2]
