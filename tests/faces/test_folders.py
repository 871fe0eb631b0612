import errno
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from utils.faces import folders as face_images
from utils.faces.folders import FaceReader, identity_folders, load_packed, pack, read_image, select
from utils.runtime.errors import UserError
from utils.runtime.files import write_npz


def make_faces(root, counts: dict[str, int], seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """Random 112 x 112 PNGs `<identity>/<k>.png`; returns their pixels."""
    generator = np.random.default_rng(seed)
    pixels = {}
    for identity, count in counts.items():
        (root / identity).mkdir(parents=True)
        for k in range(count):
            pixels[identity, f"{k}.png"] = generator.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            Image.fromarray(pixels[identity, f"{k}.png"]).save(root / identity / f"{k}.png")
    return pixels


def test_identity_folders_are_in_file_name_order(tmp_path):
    make_faces(tmp_path, {"b": 2, "a": 11, "c": 0})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "stray.png").write_bytes(b"")
    folders = identity_folders(tmp_path)
    assert list(folders) == ["a", "b"]
    assert [path.name for path in folders["a"]][:4] == ["0.png", "1.png", "10.png", "2.png"]
    with pytest.raises(UserError, match="no such folder"):
        identity_folders(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no images"):
        identity_folders(tmp_path / "c")


def test_select_takes_the_first_identities_and_images(tmp_path):
    make_faces(tmp_path, {"a": 3, "b": 1, "c": 2})
    folders = identity_folders(tmp_path)
    chosen = select(folders, identities=2, images_per_identity=2)
    assert {name: [path.name for path in paths] for name, paths in chosen.items()} == {
        "a": ["0.png", "1.png"], "b": ["0.png"]}
    assert select(folders, 0, 0) == folders
    assert list(select(folders, identities=1, images_per_identity=0, minimum_images=2, leave_out={"a"})) == ["c"]


def test_pack_keeps_pixels_labels_and_paths(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"anna": 3, "bert": 1, "carl": 2})
    packed = pack(identity_folders(tmp_path / "faces"), tmp_path / "packed" / "faces.npy")
    assert packed.images.shape == (6, 112, 112, 3) and packed.images.dtype == np.uint8
    assert isinstance(packed.images, np.memmap)
    assert packed.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert packed.identities.tolist() == ["anna", "bert", "carl"]
    assert packed.paths.tolist() == ["anna/0.png", "anna/1.png", "anna/2.png", "bert/0.png", "carl/0.png", "carl/1.png"]
    for image, path in zip(packed.images, packed.paths, strict=True):
        assert np.array_equal(image, pixels[tuple(path.split("/"))])
    again = load_packed(tmp_path / "packed" / "faces.npy")
    assert again.listing == packed.listing and np.array_equal(again.images, packed.images)


def test_pack_goes_on_past_one_block_of_images(tmp_path, monkeypatch):
    pixels = make_faces(tmp_path / "faces", {"a": 5, "b": 6})
    monkeypatch.setattr(face_images, "BLOCK", 4)
    packed = pack(identity_folders(tmp_path / "faces"), tmp_path / "faces.npy")
    assert all(np.array_equal(image, pixels[tuple(path.split("/"))])
               for image, path in zip(packed.images, packed.paths, strict=True))


def test_pack_is_done_once_and_again_when_the_folder_changes(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"a": 2, "b": 1})
    file = tmp_path / "faces.npy"
    first = pack(identity_folders(tmp_path / "faces"), file)
    written = file.stat().st_mtime_ns
    assert pack(identity_folders(tmp_path / "faces"), file).listing == first.listing
    assert file.stat().st_mtime_ns == written

    Image.fromarray(255 - pixels["b", "0.png"]).save(tmp_path / "faces" / "b" / "0.png")
    os.utime(tmp_path / "faces" / "b" / "0.png", ns=(1, 1))
    changed = pack(identity_folders(tmp_path / "faces"), file)
    assert changed.listing != first.listing
    assert np.array_equal(changed.images[2], 255 - pixels["b", "0.png"])
    smaller = pack(select(identity_folders(tmp_path / "faces"), 1, 0), file)
    assert smaller.paths.tolist() == ["a/0.png", "a/1.png"]


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "not a readable image"),
    (lambda path: path.write_bytes(b"not a picture"), "not a readable image"),
    (lambda path: path.write_bytes(b""), "not a readable image"),
    (lambda path: Image.new("RGB", (128, 112)).save(path), "128 x 112, not 112 x 112; run align.py")])
def test_a_bad_image_is_named_and_nothing_is_written(tmp_path, damage, words):
    make_faces(tmp_path / "faces", {"a": 2, "b": 2})
    damage(tmp_path / "faces" / "b" / "1.png")
    with pytest.raises(UserError, match=words) as error:
        pack(identity_folders(tmp_path / "faces"), tmp_path / "packed" / "faces.npy")
    assert str(tmp_path / "faces" / "b" / "1.png") in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "packed").iterdir()) == []


def test_grey_images_are_read_as_rgb(tmp_path):
    Image.new("L", (112, 112), 90).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").tolist() == np.full((112, 112, 3), 90).tolist()


def test_an_array_without_its_index_or_a_cut_one_is_refused(tmp_path):
    make_faces(tmp_path / "faces", {"a": 2})
    file = tmp_path / "faces.npy"
    pack(identity_folders(tmp_path / "faces"), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="faces.npy: is not a readable array"):
        load_packed(file)
    np.save(file, np.zeros((3, 112, 112, 3), np.uint8))
    with pytest.raises(UserError, match="not uint8 of 2 faces"):
        load_packed(file)


@pytest.mark.parametrize("labels, words", [([0, 0, 2], "labels 0 to 2, but 2 identities"),
                                           ([0, -1, 1], "labels -1 to 1, but 2 identities"),
                                           ([1, 1, 1], "no image of identity a")])
def test_labels_out_of_range_and_empty_classes_are_refused(tmp_path, labels, words):
    make_faces(tmp_path / "faces", {"a": 2, "b": 1})
    file = tmp_path / "faces.npy"
    packed = pack(identity_folders(tmp_path / "faces"), file)
    write_npz(tmp_path / "faces.index.npz", labels=np.array(labels), identities=packed.identities, paths=packed.paths,
              listing=np.array(packed.listing))
    with pytest.raises(UserError, match=words):
        load_packed(file)


def test_batches_are_the_asked_rows_in_order(tmp_path):
    make_faces(tmp_path / "faces", {"a": 7, "b": 6})
    packed = pack(identity_folders(tmp_path / "faces"), tmp_path / "faces.npy")
    reader = FaceReader(packed.images, torch.device("cpu"))
    order = np.random.default_rng(0).permutation(12).reshape(6, 2)  # more batches than are read ahead
    batches = list(reader.batches(order))
    assert len(batches) == 6
    for rows, faces in zip(order, batches, strict=True):
        assert faces.shape == (2, 3, 112, 112) and faces.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(faces.permute(0, 2, 3, 1).numpy(), packed.images[rows])


def test_a_kill_between_array_and_index_leaves_nothing_that_looks_packed(tmp_path, monkeypatch):
    make_faces(tmp_path / "faces", {"a": 2})
    file = tmp_path / "faces.npy"
    pack(identity_folders(tmp_path / "faces"), file)
    make_faces(tmp_path / "faces", {"b": 1}, seed=1)

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(face_images, "write_npz", full_disk)
        with pytest.raises(OSError):
            pack(identity_folders(tmp_path / "faces"), file)
    assert not file.with_suffix(".index.npz").exists()
    assert len(pack(identity_folders(tmp_path / "faces"), file).images) == 3


def _pack(root, file, listings):
    listings.put(pack(identity_folders(root), file).listing)


def test_two_processes_packing_at_once_leave_one_good_array(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"a": 20, "b": 20})
    file = tmp_path / "faces.npy"
    context = multiprocessing.get_context("fork")
    listings = context.Queue()
    processes = [context.Process(target=_pack, args=(tmp_path / "faces", file, listings)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert listings.get() == listings.get()
    packed = load_packed(file)
    assert all(np.array_equal(image, pixels[tuple(path.split("/"))])
               for image, path in zip(packed.images, packed.paths, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "faces.index.npz", "faces.npy"]
