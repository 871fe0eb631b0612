"""utils/faces/images.py: what a person sees is what is read, and nothing that a file says is run."""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.faces.folders import contents
from utils.faces.images import IMAGE_SUFFIXES, read_image
from utils.runtime.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
# What EXIF's orientations 1 to 8 do to an image that is shown upright.
STORED = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
          6: PIXELS.transpose(1, 0, 2)[::-1], 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: PIXELS.transpose(1, 0, 2)[:, ::-1]}


def refused(file: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_image(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_upright_whatever_way_it_is_stored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS)


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "webp"])
def test_formats_without_loss_give_their_pixels(tmp_path, suffix):
    Image.fromarray(PIXELS).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), PIXELS) and f".{suffix}" in IMAGE_SUFFIXES


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jfif", "jpe"])
def test_jpegs_are_read_by_any_of_their_names(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).save(file, "JPEG")
    assert np.array_equal(read_image(file), np.asarray(Image.open(file).convert("RGB"))) and f".{suffix}" in IMAGE_SUFFIXES


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_as_8(tmp_path, suffix):
    grey = PIXELS[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), np.repeat(grey[..., None], 3, axis=2))


def test_what_is_transparent_lies_on_white(tmp_path):
    alpha = np.full((24, 16, 1), 255, np.uint8)
    alpha[:4], alpha[4:8] = 0, 51
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(tmp_path / "a.png")
    seen = read_image(tmp_path / "a.png").astype(int)
    assert (seen[:4] == 255).all() and np.array_equal(seen[8:], PIXELS[8:])
    assert np.abs(seen[4:8] - (255 * 0.8 + PIXELS[4:8] * 0.2)).max() <= 1
    palette = Image.fromarray(PIXELS).quantize(8)
    palette.save(tmp_path / "p.png", transparency=0)
    assert (read_image(tmp_path / "p.png")[np.asarray(palette) == 0] == 255).all()


def test_a_grey_level_of_16_bits_may_be_the_transparent_one(tmp_path):
    grey = np.full((24, 16), 40_000, np.uint16)
    grey[:4] = 7
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=7)
    seen = read_image(tmp_path / "a.png")
    assert (seen[:4] == 255).all() and (seen[4:] == 156).all()


@pytest.mark.parametrize("form", ["PPM", "ICO", "PCX", "TGA", "PDF", "DDS"])
def test_other_formats_are_called_what_they_are_not(tmp_path, form):
    Image.fromarray(PIXELS).save(tmp_path / "a", form)
    (tmp_path / "a").rename(tmp_path / "a.png")
    refused(tmp_path / "a.png", "is not a readable image (none of PNG, JPEG, WEBP, BMP, TIFF, GIF, or damaged); ")


def test_of_several_pictures_the_first_is_seen_in_any_mode(tmp_path):
    image, other = Image.fromarray(PIXELS), Image.new("RGB", (16, 24), "white")
    image.save(tmp_path / "a.png", save_all=True, append_images=[other])
    assert np.array_equal(read_image(tmp_path / "a.png"), PIXELS)
    image.save(tmp_path / "m.jpg", "MPO", save_all=True, append_images=[other])  # of phones
    image.save(tmp_path / "j.jpg", "JPEG")
    assert np.abs(read_image(tmp_path / "m.jpg").astype(int) - read_image(tmp_path / "j.jpg")).mean() < 2
    image.convert("CMYK").save(tmp_path / "c.tif")
    assert np.abs(read_image(tmp_path / "c.tif").astype(int) - PIXELS).max() <= 1
    image.convert("1").save(tmp_path / "1.png")
    assert set(np.unique(read_image(tmp_path / "1.png"))) == {0, 255}


def test_floating_point_and_32_bits_are_refused(tmp_path):
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "f.tif")
    refused(tmp_path / "f.tif", "floating-point", "8 or 16 bits")
    Image.fromarray(PIXELS[..., 0].astype(np.int32) * 100_000).save(tmp_path / "i.tif")
    refused(tmp_path / "i.tif", "more than 16 bits")


def test_an_eps_starts_no_program_whatever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin" / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("a.png", "a.jpg", "a.eps", "A.PNG"):
        (tmp_path / name).write_bytes(eps)
        refused(tmp_path / name, "is not a readable image (none of PNG, JPEG, ", "replace it by a PNG or JPEG")
    assert not (tmp_path / "started").exists()


def test_what_is_no_file_is_refused_and_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    refused(tmp_path / "fifo.png", "not a regular file")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    refused(tmp_path / "link.png", "a link to nothing")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "not a regular file")
    (tmp_path / "terabyte.png").touch()
    os.truncate(tmp_path / "terabyte.png", 2**40)
    refused(tmp_path / "terabyte.png", "not a regular file of at most")
    assert list(contents([tmp_path / "terabyte.png", tmp_path / "link.png"])) == ["no file"] * 2  # in no time


def test_sizes_that_are_no_photographs_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.faces.images.MOST_PIXELS", 16 * 24 - 1)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "16 x 24 are more than")


@pytest.mark.parametrize("cut", [0, 5, 40, 200, 900])
def test_cut_and_foreign_files_are_refused(tmp_path, cut):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    refused(tmp_path / "a.png", "is not a readable image", "or remove it")
    (tmp_path / "a.jpg").write_bytes(os.urandom(cut))
    refused(tmp_path / "a.jpg", "is not a readable image")


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    Image.fromarray(PIXELS).save(file)
    assert np.array_equal(read_image(file), PIXELS)
