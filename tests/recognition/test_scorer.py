"""The real faces that runs are compared with."""
from pathlib import Path

from utils.recognition.scorer import at_most


def test_many_real_faces_are_thinned_evenly():
    faces = {name: [Path(f"{name}{k}") for k in range(4)] for name in "abc"}
    assert at_most(faces, 6) == {name: [Path(f"{name}0"), Path(f"{name}2")] for name in "abc"}
    assert at_most(faces, 20) == faces
