"""All faces of a training set in one array: packed once, whole or not at all, and read in any order."""
import errno
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from utils.faces import packed as packed_faces
from utils.faces.folders import identity_folders, listing, select
from utils.faces.packed import FaceReader, PackedFaces, load_packed, pack
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


def pack_folder(root, file, identities: int = 0) -> PackedFaces:
    folders = select(identity_folders(root), identities, 0)
    pack(folders, file, listing(folders))
    return load_packed(file)


def assert_holds(packed: PackedFaces, pixels: dict[tuple[str, str], np.ndarray]) -> None:
    assert len(packed.images) == len(packed.paths) == len(pixels)
    for image, path in zip(packed.images, packed.paths, strict=True):
        assert np.array_equal(image, pixels[tuple(path.split("/"))])


def test_pack_keeps_pixels_labels_and_paths(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"anna": 3, "bert": 1, "carl": 2})
    packed = pack_folder(tmp_path / "faces", tmp_path / "packed" / "faces.npy")
    assert packed.images.shape == (6, 112, 112, 3) and packed.images.dtype == np.uint8
    assert isinstance(packed.images, np.memmap)
    assert packed.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert packed.identities.tolist() == ["anna", "bert", "carl"]
    assert packed.paths.tolist() == ["anna/0.png", "anna/1.png", "anna/2.png", "bert/0.png", "carl/0.png", "carl/1.png"]
    assert_holds(packed, pixels)
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == ["faces.index.npz", "faces.json", "faces.npy"]


def test_pack_goes_on_past_one_block_of_images(tmp_path, monkeypatch):
    pixels = make_faces(tmp_path / "faces", {"a": 5, "b": 6})
    monkeypatch.setattr(packed_faces, "BLOCK", 4)
    assert_holds(pack_folder(tmp_path / "faces", tmp_path / "faces.npy"), pixels)


def test_pack_is_done_once_and_again_for_other_images(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"a": 2, "b": 1})
    file = tmp_path / "faces.npy"
    pack_folder(tmp_path / "faces", file)
    written = file.stat().st_mtime_ns
    pack_folder(tmp_path / "faces", file)
    assert file.stat().st_mtime_ns == written

    pixels["b", "0.png"] = 255 - pixels["b", "0.png"]
    Image.fromarray(pixels["b", "0.png"]).save(tmp_path / "faces" / "b" / "0.png")
    assert_holds(pack_folder(tmp_path / "faces", file), pixels)
    smaller = pack_folder(tmp_path / "faces", file, identities=1)
    assert smaller.paths.tolist() == ["a/0.png", "a/1.png"] and len(smaller.images) == 2


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "not a readable image"),
    (lambda path: Image.new("RGB", (128, 112)).save(path), "128 x 112 px, not 112 x 112; run align.py")],
    ids=["torn", "another size"])
def test_a_bad_image_is_named_and_no_array_is_left(tmp_path, damage, words):
    pixels, bad = make_faces(tmp_path / "faces", {"a": 2, "b": 2}), tmp_path / "faces" / "b" / "1.png"
    damage(bad)
    with pytest.raises(UserError, match=words) as error:
        pack_folder(tmp_path / "faces", tmp_path / "packed" / "faces.npy")
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert sorted(file.name for file in (tmp_path / "packed").iterdir()) == ["faces.index.npz", "faces.json"]
    Image.fromarray(pixels["b", "1.png"]).save(bad)
    assert_holds(pack_folder(tmp_path / "faces", tmp_path / "packed" / "faces.npy"), pixels)


def test_an_array_without_its_index_or_a_cut_one_is_refused(tmp_path):
    make_faces(tmp_path / "faces", {"a": 2})
    file = tmp_path / "faces.npy"
    pack_folder(tmp_path / "faces", file)
    whole = file.read_bytes()
    for damaged, words in ((whole[:-100], "faces.npy: is not a readable array"), (b"", "faces.npy: is not a readable array")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            load_packed(file)
    np.save(file, np.zeros((3, 112, 112, 3), np.uint8))
    with pytest.raises(UserError, match="not uint8 of 2 faces; delete both"):
        load_packed(file)
    file.write_bytes(whole)
    file.with_suffix(".index.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="faces.index.npz: is not a readable .npz"):
        load_packed(file)
    file.with_suffix(".index.npz").unlink()
    with pytest.raises(UserError, match="faces.index.npz: no such file .*; delete both"):
        load_packed(file)


@pytest.mark.parametrize("labels", [[0, 0, 2], [0, -1, 1], [1, 1, 1]], ids=["too high", "negative", "an empty class"])
def test_labels_out_of_range_and_empty_classes_are_refused(tmp_path, labels):
    make_faces(tmp_path / "faces", {"a": 2, "b": 1})
    packed = pack_folder(tmp_path / "faces", tmp_path / "faces.npy")
    write_npz(tmp_path / "faces.index.npz", labels=np.array(labels), identities=packed.identities, paths=packed.paths)
    with pytest.raises(UserError, match="faces.index.npz: its labels are not those of its 2 identities"):
        load_packed(tmp_path / "faces.npy")


def test_batches_are_the_asked_rows_in_order(tmp_path):
    make_faces(tmp_path / "faces", {"a": 7, "b": 6})
    packed = pack_folder(tmp_path / "faces", tmp_path / "faces.npy")
    reader = FaceReader(packed.images, torch.device("cpu"))
    order = np.random.default_rng(0).permutation(12).reshape(6, 2)  # more batches than are read ahead
    batches = list(reader.batches(order))
    assert len(batches) == 6
    for rows, faces in zip(order, batches, strict=True):
        assert faces.shape == (2, 3, 112, 112) and faces.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(faces.permute(0, 2, 3, 1).numpy(), packed.images[rows])


@pytest.mark.parametrize("failing", ["write_npz", "atomic_write"], ids=["the index", "the array"])
def test_a_full_disk_leaves_nothing_that_looks_packed(tmp_path, monkeypatch, failing):
    pixels = make_faces(tmp_path / "faces", {"a": 2})
    file = tmp_path / "faces.npy"
    pack_folder(tmp_path / "faces", file)
    pixels |= make_faces(tmp_path / "faces", {"b": 1}, seed=1)

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(packed_faces, failing, full_disk)
        with pytest.raises(OSError):
            pack_folder(tmp_path / "faces", file)
    assert not file.exists()
    assert_holds(pack_folder(tmp_path / "faces", file), pixels)


def test_two_processes_packing_at_once_leave_one_good_array(tmp_path):
    pixels = make_faces(tmp_path / "faces", {"a": 20, "b": 20})
    file = tmp_path / "faces.npy"
    context = multiprocessing.get_context("fork")
    folders = identity_folders(tmp_path / "faces")
    processes = [context.Process(target=pack, args=(folders, file, listing(folders))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_holds(load_packed(file), pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "faces.index.npz", "faces.json", "faces.npy"]
