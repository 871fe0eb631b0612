"""The lists beside the aligned faces, and reading them."""
import numpy as np
import pytest
from PIL import Image

from utils.faces.aligned import keep, merge, read_aligned, read_kept, read_list, write_kept, write_list, write_lists
from utils.runtime.errors import UserError


def test_lists_of_all_ranks_and_of_killed_runs_come_together(tmp_path):
    a, b, c, d = ("a", 'ü, "2".png'), ("b", "1.png"), ("c", "3\u2028.png"), ("d", "gone.png")
    write_list(tmp_path, "failures", {b: "no face found", d: "no face found"})
    write_list(tmp_path, "sources", {b: "1", d: "4"})
    write_lists(tmp_path, {a: "landmarks are mirrored"}, {a: "2"}, rank=0)
    write_lists(tmp_path, {c: "x: is not readable"}, {c: "3"}, rank=7)
    failures = {a: "landmarks are mirrored", b: "no face found", c: "x: is not readable"}
    assert merge(tmp_path, {a, b, c}) == (failures, {a: "2", b: "1", c: "3"})
    assert read_list(tmp_path / "failures.csv", "failures") == failures
    assert sorted(file.name for file in tmp_path.iterdir()) == ["failures.csv", "sources.csv"]


def test_what_was_repaired_is_no_failure_any_more(tmp_path):
    image = ("a", "1.png")
    write_list(tmp_path, "failures", {image: "no face found"})
    write_list(tmp_path, "sources", {image: "old"})
    write_lists(tmp_path, {}, {image: "new"}, rank=1)
    assert merge(tmp_path, {image}) == ({}, {image: "new"})


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
