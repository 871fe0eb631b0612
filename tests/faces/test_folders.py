"""Folders of images, which of them are chosen, and reading an image."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.faces.folders import identity_folders, image_folders, joined_folders, listing, misplaced_images, select
from utils.faces.images import read_image
from utils.runtime.errors import UserError


def make_files(root: Path, *names: str) -> None:
    """Empty files: of folders only the names are read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def names(folders: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {identity: [path.name for path in paths] for identity, paths in folders.items()}


def test_identity_folders_are_in_file_name_order(tmp_path):
    make_files(tmp_path, "b/1.PNG", "b/0.jpg", *(f"a/{k}.png" for k in range(11)), "a/notes.txt", "a/.hidden.png",
               ".cache/0.png", "stray.png")
    (tmp_path / "c").mkdir()
    folders = identity_folders(tmp_path)
    assert list(folders) == ["a", "b"]
    assert names(folders)["a"] == ["0.png", "1.png", "10.png", *(f"{k}.png" for k in range(2, 10))]
    assert folders["b"] == [tmp_path / "b" / "0.jpg", tmp_path / "b" / "1.PNG"]
    with pytest.raises(UserError, match="absent: no such folder"):
        identity_folders(tmp_path / "absent")
    with pytest.raises(UserError, match="c: holds no images"):
        identity_folders(tmp_path / "c")


def test_images_a_level_too_deep_are_refused_or_named(tmp_path):
    make_files(tmp_path, "A/0.png", "A/old/1.png", "stray.jpg", "notes.txt", ".hidden.png", "empty/notes/list.txt")
    assert names(identity_folders(tmp_path)) == {"A": ["0.png"]}
    assert misplaced_images(tmp_path) == [tmp_path / "stray.jpg", tmp_path / "A" / "old" / "1.png"]
    make_files(tmp_path, "family/B/0.png")
    with pytest.raises(UserError, match="family: holds folders of images .B. instead of images; .* such as .*family itself"):
        identity_folders(tmp_path)


def test_a_flat_folder_has_a_person_in_each_image(tmp_path):
    make_files(tmp_path, "b.png", "a.png", "c.jpg", "notes.txt")
    assert image_folders(tmp_path) == {name: [tmp_path / name] for name in ("a.png", "b.png", "c.jpg")}
    with pytest.raises(UserError, match="absent: no such folder"):
        image_folders(tmp_path / "absent")


def test_images_beside_folders_are_refused(tmp_path):
    make_files(tmp_path, "A/0.png", "B/0.png")
    assert names(image_folders(tmp_path)) == {"A": ["0.png"], "B": ["0.png"]}
    make_files(tmp_path, "stray.png")
    with pytest.raises(UserError, match="holds images, stray.png for one, and folders, A for one"):
        image_folders(tmp_path)


def test_select_takes_the_first_identities_and_images(tmp_path):
    make_files(tmp_path, "a/0.png", "a/1.png", "a/2.png", "b/0.png", "c/0.png", "c/1.png")
    folders = identity_folders(tmp_path)
    assert names(select(folders, identities=2, images_per_identity=2)) == {"a": ["0.png", "1.png"], "b": ["0.png"]}
    assert select(folders, 0, 0) == folders
    assert list(select(folders, identities=1, images_per_identity=0, minimum_images=2, leave_out={"a"})) == ["c"]


def test_a_listing_is_another_one_when_a_name_or_a_content_changes_and_only_then(tmp_path):
    make_files(tmp_path, "a/0.png", "a/1.png", "b/0.png")
    for k, file in enumerate(sorted(tmp_path.glob("*/*"))):
        file.write_bytes(b"%d" % k)
    seen = [listing(identity_folders(tmp_path))]
    os.utime(tmp_path / "b" / "0.png", ns=(99, 99))
    shutil.copytree(tmp_path, tmp_path.parent / "copy")  # other times, other inodes
    assert listing(identity_folders(tmp_path)) == listing(identity_folders(tmp_path.parent / "copy")) == seen[0]
    before = (tmp_path / "b" / "0.png").stat()
    (tmp_path / "b" / "0.png").write_bytes(b"x")  # of the same size and time
    os.utime(tmp_path / "b" / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(listing(identity_folders(tmp_path)))
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    seen.append(listing(identity_folders(tmp_path)))
    (tmp_path / "b").rename(tmp_path / "c")
    seen.append(listing(identity_folders(tmp_path)))
    (tmp_path / "c" / "0.png").unlink()
    (tmp_path / "c" / "0.png").symlink_to("nowhere")
    seen.append(listing(identity_folders(tmp_path)))
    assert len(set(seen)) == 5 and all(len(digest) == 64 for digest in seen)


# ---- an image --------------------------------------------------------------------------------------------------------

def test_grey_images_are_read_as_rgb(tmp_path):
    Image.new("L", (112, 112), 90).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == np.full((112, 112, 3), 90).tolist()


@pytest.mark.parametrize("damage", [lambda data: data[:2000], lambda data: b"not a picture", lambda data: b""],
                         ids=["torn", "text", "empty"])
def test_what_is_no_whole_image_is_named_in_one_line(tmp_path, damage):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "face.png")
    assert read_image(tmp_path / "face.png").shape == (40, 60, 3)
    (tmp_path / "face.png").write_bytes(damage((tmp_path / "face.png").read_bytes()))
    with pytest.raises(UserError, match="face.png: is not a readable image") as error:
        read_image(tmp_path / "face.png")
    assert "\n" not in str(error.value)


def test_identities_of_several_folders_never_share_a_name(tmp_path):
    for name in ("a/faces/Ann/0.png", "b/faces/Ann/0.png", "flat/Ann"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "flat" / "Ann").rename(tmp_path / "flat" / "Ann.png")
    first, second, flat = tmp_path / "a" / "faces", tmp_path / "b" / "faces", tmp_path / "flat"
    assert joined_folders([first]) == {"Ann": [first / "Ann" / "0.png"]}
    assert joined_folders([first, flat]) == {"faces/Ann": [first / "Ann" / "0.png"], "flat/Ann.png": [flat / "Ann.png"]}
    assert joined_folders([second, first]) == {"b/faces/Ann": [second / "Ann" / "0.png"],
                                               "a/faces/Ann": [first / "Ann" / "0.png"]}
    with pytest.raises(UserError, match="b/../a/faces: is given twice"):
        joined_folders([tmp_path / "b" / ".." / "a" / "faces", first])
    with pytest.raises(UserError, match="training.faces: is empty"):
        joined_folders([])
