"""The band filter's order, bounds and estimate, by hand."""
from pathlib import Path

import numpy as np
import pytest

from utils.recognition import band
from utils.recognition.band import Band, estimate, in_turns

FACES = {"a": [Path("a/0"), Path("a/1"), Path("a/2")], "b": [Path("b/0")], "c": [], "d": [Path("d/0"), Path("d/1")]}


def test_identities_take_turns():
    assert [str(face) for face in in_turns(FACES)] == ["a/0", "b/0", "d/0", "a/1", "d/1", "a/2"]


@pytest.mark.parametrize("cosine, reason", [(0.3, None), (0.8, None), (0.29994, "cosine 0.2999 is below 0.3"),
                                            (0.81, "cosine 0.8100 is above 0.8"), (np.nan, "cosine nan is below 0.3")])
def test_the_bounds_are_within(cosine, reason):
    assert Band(0.3, 0.8, {}, None, {}).reason(cosine) == reason


@pytest.mark.parametrize("inside, images, wanted, words", [
    (250, 500, 50, "250 of the first 500 images lie in the band (50.0%); sample about 100 of each identity to keep 50"),
    (3, 7, 2, "(42.9%); sample about 5 of each identity to keep 2 on average"), (0, 9, 2, "(0.0%); widen it")])
def test_how_many_it_takes(inside, images, wanted, words):
    assert words in estimate(inside, images, wanted)


def test_the_first_images_are_measured_and_counted_before_the_others(tmp_path, monkeypatch, capsys):
    """Four first images of which one has no face, and three faces of which one is in the band."""
    monkeypatch.setattr(band, "FIRST", 4)
    values = {"a/0": 0.9, "b/0": 0.5, "d/0": 0.1, "d/1": 0.6, "a/2": 0.7}
    calls = []

    def embed(faces):
        calls.append([str(face) for face in faces])
        return np.array([[values[str(face)], (1 - values[str(face)] ** 2) ** 0.5] for face in faces])

    contexts = dict.fromkeys("abd", np.float32([1, 0]))
    found = {name: [face for face in faces if str(face) in values] for name, faces in FACES.items()}
    told = Band(0.4, 0.65, contexts, embed, {}).outside(FACES, found, tmp_path / "cosines.npz", 3)
    assert calls == [["a/0", "b/0", "d/0"], ["d/1", "a/2"]]  # a/1 has no face
    assert {str(face): reason.split()[3] for face, reason in told.items()} == {"a/0": "above", "d/0": "below", "a/2": "above"}
    assert "1 of the first 4 images lie in the band (25.0%); sample about 12 of each identity" in capsys.readouterr().out
    wider = Band(-1, 1, contexts, lambda faces: pytest.fail("embedded again"), {})
    assert wider.outside(FACES, found, tmp_path / "cosines.npz", 3) == {}
    assert "3 of the first 4 images" in capsys.readouterr().out

    # an image without a face is gone: the others' turns change, their cosines do not
    images = {name: [face for face in faces if str(face) != "a/1"] for name, faces in FACES.items()}
    assert in_turns(images) != [face for face in in_turns(FACES) if str(face) != "a/1"]
    again = Band(0.4, 0.65, contexts, lambda faces: pytest.fail("embedded again"), {})
    assert again.outside(images, found, tmp_path / "cosines.npz", 3) == told
