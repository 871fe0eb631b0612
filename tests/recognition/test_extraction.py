"""Contexts from a folder of faces."""
import cv2
import numpy as np
import pytest
import torch
from torch import nn

from utils.recognition import extraction
from utils.recognition.extraction import extract
from utils.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def faces(tmp_path):
    """Two identities with 3 and 2 faces, of one colour each (R, G, B)."""
    colours = {"ann/a.png": (255, 0, 0), "ann/b.png": (0, 255, 0), "ann/c.png": (0, 255, 0),
               "bob/a.png": (0, 0, 255), "bob/d.png": (255, 255, 255)}
    for name, rgb in colours.items():
        file = tmp_path / "faces" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        size = 128 if name.endswith("b.png") else 112
        cv2.imwrite(str(file), np.full((size, size, 3), rgb[::-1], np.uint8))
    return tmp_path / "faces"


class MeanColour(nn.Module):
    """An embedding that can be worked by hand: the mean of each channel, 0 (black) to 2 (white)."""

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.mean(dim=(2, 3)) + 1


@pytest.fixture(autouse=True)
def mean_colour(monkeypatch) -> None:
    monkeypatch.setattr(extraction, "load_backbone", lambda file: MeanColour())


def test_extract_per_image(faces):
    ids, contexts = extract(faces, "weights", CPU, per="image")
    assert ids == ["ann--a", "ann--b", "ann--c", "bob--a", "bob--d"]
    expected = [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], np.full(3, 3 ** -0.5)]
    assert contexts.dtype == np.float32 and np.allclose(contexts, expected, atol=1e-5)


def test_extract_per_identity_is_the_normalised_mean_of_normalised_embeddings(faces):
    ids, contexts = extract(faces, "weights", CPU, per="identity")
    assert ids == ["ann", "bob"]
    bob = np.array([0, 0, 1]) + 3 ** -0.5
    expected = [np.array([1, 2, 0]) / 5 ** 0.5, bob / np.linalg.norm(bob)]
    assert contexts.dtype == np.float32 and np.allclose(contexts, expected, atol=1e-5)


def test_an_unreadable_image_is_named(faces):
    (faces / "bob" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="bob/a.png: is not a readable image"):
        extract(faces, "weights", CPU, per="image")
