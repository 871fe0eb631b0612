"""The generator's training faces: found, cut out, embedded and encoded once."""
import csv
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.autoencoder import Autoencoder
from tests.drawn_face import draw_face, landmarks_at
from utils.faces.folders import image_folders
from utils.faces.template import ARCFACE, warp
from utils.recognition.embedding import read_unaligned
from utils.runtime.errors import UserError
from utils.runtime.ranks import Ranks
from utils.training import faces as training_faces

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def save_noise(folder: Path, *names: str) -> None:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)


def whole_faces(folder: Path, *names: str) -> training_faces.TrainingFaces:
    save_noise(folder, *names)
    return training_faces.find(image_folders(folder), folder.parent / "cache", True, 0.5, CPU)


# ---- what is cut out -------------------------------------------------------------------------------------------------

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


# ---- finding them ----------------------------------------------------------------------------------------------------

def test_whole_images_are_all_taken(tmp_path):
    faces = whole_faces(tmp_path / "flat", "b.png", "a.png", "c.jpg")
    assert faces.identities == ["a.png", "b.png", "c.jpg"] and faces.labels.tolist() == [0, 1, 2]
    assert faces.landmarks is None and [file.name for file in faces.files] == faces.identities


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """`Ann` with two faces of different sizes, `Bo` with a wall, `Zoë` with a face and a broken image."""
    folder = tmp_path_factory.mktemp("photos")
    for name, image in {"Ann/0.png": draw_face(100), "Ann/1.png": draw_face(140), "Bo/0.png": np.full((80, 80, 3), 90, np.uint8),
                        "Zoë/0.png": draw_face(120)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name)
    (folder / "Zoë" / "1.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory) -> tuple[training_faces.TrainingFaces, Path]:
    """The faces of `photos`, and the folder they are cached in."""
    cache = tmp_path_factory.mktemp("cache")
    return training_faces.prepare((str(photos),), "", False, 0.4, cache, ALONE), cache


def test_faces_are_found_and_images_without_one_are_listed(found):
    faces, cache = found
    assert faces.identities == ["Ann", "Zoë"] and faces.labels.tolist() == [0, 0, 1]
    assert [f"{file.parent.name}/{file.name}" for file in faces.files] == ["Ann/0.png", "Ann/1.png", "Zoë/0.png"]
    for landmarks, size in zip(faces.landmarks, (100, 140, 120), strict=True):
        assert np.abs(landmarks - landmarks_at(size)).max() < 0.03 * size
    with open(cache / "failures.csv", encoding="utf-8", newline="") as file:
        failures = [(row["identity"], row["image"], row["reason"]) for row in csv.DictReader(file)]
    assert failures[0] == ("Bo", "0.png", "no face found") and failures[1][:2] == ("Zoë", "1.jpg")
    assert failures[1][2].startswith("is not a readable image") and len(failures) == 2


def test_they_are_found_once_until_the_folder_or_the_search_changes(found, photos, monkeypatch):
    faces, cache = found
    searched, in_processes = [], training_faces.in_processes
    monkeypatch.setattr(training_faces, "in_processes", lambda work, processes, device:
                        searched.extend(map(len, work.batches)) or in_processes(work, 1, device))
    again = training_faces.prepare((str(photos),), "", False, 0.4, cache, ALONE)
    assert searched == [] and again.digest == faces.digest
    np.testing.assert_array_equal(again.landmarks, faces.landmarks)
    other = training_faces.prepare((str(photos),), "", False, 0.3, cache, ALONE)
    assert searched == [5] and other.digest != faces.digest
    training_faces.prepare((str(photos),), "", False, 0.4, cache, ALONE)
    assert searched == [5, 5]


def test_people_may_be_left_out(photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Ann\n")
    faces = training_faces.prepare((str(photos),), str(names), True, 0.4, tmp_path / "cache", ALONE)
    assert faces.identities == ["Ann", "Bo", "Zoë"] and faces.left_out == {"Ann"}
    names.write_text("Ann\nBob\n")
    with pytest.raises(UserError, match=r"names.txt:2: 'Bob' is not there to be chosen \(training.leave_out\); "
                       "did you mean 'Bo'?"):
        training_faces.prepare((str(photos),), str(names), True, 0.4, tmp_path / "cache", ALONE)
    names.write_text("Ann\nBo\nZoë\n")
    with pytest.raises(UserError, match="training.leave_out: leaves nobody"):
        training_faces.prepare((str(photos),), str(names), True, 0.4, tmp_path / "cache", ALONE)


def test_a_folder_without_a_face_is_refused_in_one_line(tmp_path):
    for name in ("A/0.png", "B/0.png"):
        (tmp_path / "f" / name).parent.mkdir(parents=True)
        Image.new("RGB", (80, 80), (40, 90, 200)).save(tmp_path / "f" / name)
    with pytest.raises(UserError, match="f: no face was found in its 2 images; see .*failures.csv") as error:
        training_faces.find(image_folders(tmp_path / "f"), tmp_path / "cache", False, 0.5, CPU)
    assert "\n" not in str(error.value)
    assert (tmp_path / "cache" / "failures.csv").read_text().count("no face found") == 2


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "f" / "A"
    folder.mkdir(parents=True)
    for k in range(5):
        Image.fromarray(draw_face(100 + 8 * k)).save(folder / f"{k}.png")
    folders = image_folders(folder.parent)
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
    assert searched == [3, 2, 0]


def people(number: int, left_out: Collection[str] = ()) -> training_faces.TrainingFaces:
    """Two faces of each."""
    return training_faces.TrainingFaces([Path("x")] * 2 * number, np.repeat(np.arange(number), 2),
                                        [f"p{k}" for k in range(number)], None, "digest", left_out)


def test_one_in_25_people_is_held_out():
    rows, held_out, chosen = training_faces.hold_out(people(75), "")
    assert chosen.tolist() == [0, 25, 50] and held_out.tolist() == [0, 1, 50, 51, 100, 101]
    assert sorted([*rows, *held_out]) == list(range(150))


def test_people_left_out_are_neither_trained_on_nor_held_out():
    rows, held_out, chosen = training_faces.hold_out(people(76, {"p1"}), "")
    assert chosen.tolist() == [0, 26, 51]  # every 25th of those who are left
    assert sorted([*rows, *held_out]) == [0, 1, *range(4, 152)]


def test_people_are_held_out_by_name(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("p3\np0\n")
    rows, held_out, chosen = training_faces.hold_out(people(6, {"p1"}), str(names))
    assert chosen.tolist() == [0, 3] and held_out.tolist() == [0, 1, 6, 7] and rows.tolist() == [4, 5, 8, 9, 10, 11]
    with pytest.raises(UserError, match=r"names.txt:1: 'p3' is not there to be chosen \(training.held_out\)"):
        training_faces.hold_out(people(6, {"p3"}), str(names))
    with pytest.raises(UserError, match="names.txt: holds 2 of 3 people out"):
        training_faces.hold_out(people(4, {"p1"}), str(names))


def test_several_folders_are_one_training_set(photos, tmp_path):
    other = tmp_path / "other"
    save_noise(other, "Ann/0.png", "Ann/1.png", "Cy/0.png", "Di/0.png")
    (tmp_path / "names.txt").write_text("other/Cy\nphotos0/Ann\n")
    faces = training_faces.prepare((str(other), str(photos)), str(tmp_path / "names.txt"), True, 0.4, tmp_path / "cache", ALONE)
    assert faces.identities == ["other/Ann", "other/Cy", "other/Di", "photos0/Ann", "photos0/Bo", "photos0/Zoë"]
    assert faces.labels.tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 5]
    rows, held_out, chosen = training_faces.hold_out(faces, "")
    assert [faces.identities[k] for k in chosen] == ["other/Ann", "photos0/Bo"] and rows.tolist() == [3, 7, 8]
    with pytest.raises(UserError, match="names.txt:1: 'other/Cy' is not there"):
        training_faces.prepare((str(photos),), str(tmp_path / "names.txt"), True, 0.4, tmp_path / "cache", ALONE)


# ---- the caches ------------------------------------------------------------------------------------------------------

def test_what_was_cut_out_is_kept_until_the_images_change(tmp_path):
    faces = whole_faces(tmp_path / "f", "A/0.png", "A/1.png", "B/0.png")
    cache = tmp_path / "cache"
    first = training_faces.crops(faces, cache, 16, 0)
    assert first.shape == (3, 16, 16, 3) and faces.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(first[2], training_faces.crop(np.asarray(Image.open(faces.files[2])), None, 16, 0))
    (tmp_path / "f" / "B" / "0.png").rename(tmp_path / "f" / "B" / "9.png")  # a cached array needs no image
    training_faces.crops(faces, cache, 16, 0)
    (tmp_path / "f" / "B" / "9.png").rename(tmp_path / "f" / "B" / "0.png")
    changed = whole_faces(tmp_path / "f", "C/0.png")
    assert changed.digest != faces.digest
    assert len(training_faces.crops(changed, cache, 16, 0)) == 4


def test_crops_of_another_margin_or_size_lie_beside_one_another(found):
    faces, cache = found
    wide, narrow = training_faces.crops(faces, cache, 64, 12), training_faces.crops(faces, cache, 64, 0)
    for crops, margin in ((wide, 12), (narrow, 0)):
        for crop, file, landmarks in zip(crops, faces.files, faces.landmarks, strict=True):
            np.testing.assert_array_equal(crop, training_faces.crop(np.asarray(Image.open(file)), landmarks, 64, margin))
    assert {file.name for file in cache.glob("crops-*.npy")} >= {"crops-64-margin12.npy", "crops-64-margin0.npy"}


class MeanColour(nn.Module):
    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.mean(dim=(2, 3)) + 1


def test_contexts_are_the_recogniser_s_unit_embeddings_and_belong_to_it(found, tmp_path):
    faces, cache = found
    file = tmp_path / "recogniser.pth"
    file.write_bytes(b"1")
    contexts = training_faces.face_contexts(faces, cache, MeanColour(), file, CPU)
    aligned = [warp(np.asarray(Image.open(image)), landmarks, ARCFACE)
               for image, landmarks in zip(faces.files, faces.landmarks, strict=True)]
    expected = np.stack(aligned).mean(axis=(1, 2)) / 127.5
    np.testing.assert_allclose(contexts, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=0, atol=1e-5)
    assert contexts.dtype == np.float32
    written = (cache / "contexts-recogniser.npy").stat().st_mtime_ns
    training_faces.face_contexts(faces, cache, MeanColour(), file, CPU)
    assert (cache / "contexts-recogniser.npy").stat().st_mtime_ns == written
    file.write_bytes(b"2")  # other weights of the same name
    training_faces.face_contexts(faces, cache, nn.Sequential(MeanColour(), nn.Linear(3, 5)), file, CPU)
    assert np.load(cache / "contexts-recogniser.npy").shape == (3, 5)


def test_contexts_of_whole_images_are_of_them_as_they_are(tmp_path):
    faces = whole_faces(tmp_path / "f", "A/0.png", "B/0.png")
    (tmp_path / "r.pth").write_bytes(b"1")
    contexts = training_faces.face_contexts(faces, tmp_path / "cache", MeanColour(), tmp_path / "r.pth", CPU)
    expected = np.stack([read_unaligned(file) for file in faces.files]).mean(axis=(1, 2)) / 127.5
    np.testing.assert_allclose(contexts, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=0, atol=1e-5)


def test_latents_are_those_of_the_crops_and_of_their_mirror_images(tmp_path):
    faces = whole_faces(tmp_path / "f", "A/0.png", "B/0.png")
    crops = training_faces.crops(faces, tmp_path / "cache", 16, 0)
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), 1, 3, 3, 16).eval()
    (tmp_path / "encoder").write_bytes(b"1")
    latents = training_faces.face_latents(faces, crops, tmp_path / "cache", autoencoder, tmp_path / "encoder", CPU)
    assert latents.shape == (2, 2, 3, 8, 8) and latents.dtype == np.float16
    images = torch.from_numpy(np.array(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        for side, shown in enumerate((images, images.flip(3))):
            np.testing.assert_allclose(latents[side], autoencoder.encode(shown), rtol=2e-3, atol=2e-3)
    assert not np.allclose(latents[0], latents[1], atol=0.05)


def test_a_cached_array_is_made_once_for_what_it_is_made_from(tmp_path):
    made = []

    def write(temporary: Path) -> None:
        made.append(len(made))
        with open(temporary, "wb") as file:
            np.save(file, np.full(3, len(made)))

    def array(**made_from: object) -> list[int]:
        return training_faces.cached_array(tmp_path / "a.npy", made_from, write).tolist()

    assert array(faces="x") == array(faces="x") == [1, 1, 1]
    assert array(faces="y") == [2, 2, 2] and array(faces="y", crops=[3, 16]) == [3, 3, 3]
    assert array(crops=(3, 16), faces="y") == [3, 3, 3] and made == [0, 1, 2]

    def killed(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        training_faces.cached_array(tmp_path / "a.npy", {"faces": "z"}, killed)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert array(faces="z") == [4, 4, 4]


def test_a_cached_array_that_was_cut_is_made_again(tmp_path):
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, np.arange(99))

    def made() -> np.ndarray:
        return training_faces.cached_array(tmp_path / "a.npy", {"faces": "x"}, write)

    for length in (None, 0, 60, 300):
        if length is not None:
            (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:length])
        assert made().tolist() == list(range(99))
