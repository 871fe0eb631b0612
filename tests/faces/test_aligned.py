"""The lists beside the aligned faces, and reading them."""
import numpy as np
import pytest
from PIL import Image

from utils.faces.aligned import keep, merge_failures, read_aligned, read_failures, read_kept, write_failures, write_kept
from utils.runtime.errors import UserError


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


def test_a_face_of_another_size_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    np.testing.assert_array_equal(read_aligned(tmp_path / "face.png"), pixels)
    Image.new("RGB", (128, 112)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="wide.png: is 128 x 112 px, not 112 x 112; run align.py"):
        read_aligned(tmp_path / "wide.png")
