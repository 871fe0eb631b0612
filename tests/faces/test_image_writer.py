"""Images written in the background, and which of them count as done."""
import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.faces import image_writer
from utils.faces.image_writer import ImageWriter, is_complete_png
from utils.runtime.errors import Terminated

NOISE = np.random.default_rng(0).integers(0, 256, (200, 220, 3), dtype=np.uint8)  # two chunks of pixels
SMALL = NOISE[:16, :16]


@pytest.fixture(scope="module")
def png(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("png") / "0.png"
    with ImageWriter() as writer:
        writer.write(file, NOISE)
    return file.read_bytes()


def complete(folder: Path, data: bytes) -> bool:
    (folder / "x.png").write_bytes(data)
    return is_complete_png(folder / "x.png")


def chunks(png: bytes) -> list[bytes]:
    found, place = [], 8
    while place < len(png):
        size = 12 + int.from_bytes(png[place : place + 4])
        found.append(png[place : place + size])
        place += size
    return found


def test_what_is_written_is_complete_and_the_same_image(tmp_path, png):
    assert complete(tmp_path, png) and np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), NOISE)
    assert sum(chunk[4:8] == b"IDAT" for chunk in chunks(png)) > 1
    assert not is_complete_png(tmp_path / "absent.png") and not is_complete_png(tmp_path)
    os.mkfifo(tmp_path / "fifo.png")
    assert not is_complete_png(tmp_path / "fifo.png")
    (tmp_path / "terabyte.png").touch()
    os.truncate(tmp_path / "terabyte.png", 2**40)
    assert not is_complete_png(tmp_path / "terabyte.png")


def test_a_missing_middle_is_not_complete(tmp_path, png):
    assert not complete(tmp_path, png[: len(png) // 3] + png[len(png) // 3 + 1000 :])
    assert not complete(tmp_path, png[:70000] + bytes(1000) + png[71000:])
    parts = chunks(png)
    for left_out in range(len(parts)):
        assert not complete(tmp_path, png[:8] + b"".join(parts[:left_out] + parts[left_out + 1 :]))
    assert not complete(tmp_path, png[:8] + b"".join([parts[0], parts[2], parts[1], *parts[3:]]))
    assert not complete(tmp_path, png + png) and not complete(tmp_path, png + b"\n")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_cut_and_no_flipped_byte_is_complete(tmp_path_factory, png, data):
    place = data.draw(st.integers(0, len(png) - 1))
    folder = tmp_path_factory.getbasetemp()
    assert not complete(folder, png[:place])
    assert not complete(folder, png[:place] + bytes([png[place] ^ data.draw(st.integers(1, 255))]) + png[place + 1 :])


@given(st.binary(max_size=100))
def test_any_bytes_are_looked_at(tmp_path_factory, data):
    chunk = len(data).to_bytes(4) + b"IDAT" + data
    for png in (data, image_writer.SIGNATURE + data, image_writer.SIGNATURE + chunk + zlib.crc32(chunk[4:]).to_bytes(4)):
        assert not complete(tmp_path_factory.getbasetemp(), png)


def test_a_failed_write_is_raised_at_the_end_or_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error, ImageWriter() as writer:
        writer.write(tmp_path / "file" / "0.png", SMALL)
    assert error.value.filename in (str(tmp_path / "file"), str(tmp_path / "file" / "0.png"))
    with pytest.raises(OSError), ImageWriter() as writer:
        for k in range(1000):
            writer.write(tmp_path / "file" / f"{k}.png", SMALL)
            time.sleep(0.001)
    assert k < 999


def test_a_failed_write_is_not_lost_behind_another_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error, ImageWriter() as writer:
        writer.write(tmp_path / "file" / "0.png", SMALL)
        writer.pending[0].exception()
        raise ValueError("something else")
    assert isinstance(error.value.__context__, ValueError)


@pytest.mark.parametrize("error", [Terminated, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [False, True])
def test_a_signal_finishes_the_files_in_hand_and_drops_the_queue(tmp_path, monkeypatch, error, failing):
    begun, go_on, write = threading.Semaphore(0), threading.Event(), image_writer._write

    def slow(file: Path, pixels: np.ndarray) -> None:
        begun.release()
        go_on.wait(10)
        if failing:
            raise OSError("full")
        write(file, pixels)
    monkeypatch.setattr(image_writer, "_write", slow)
    with pytest.raises(error), ImageWriter(threads=2) as writer:
        for k in range(20):
            writer.write(tmp_path / f"{k}.png", SMALL)
        begun.acquire(), begun.acquire()
        threading.Timer(0.1, go_on.set).start()
        raise error
    assert sorted(file.name for file in tmp_path.iterdir()) == ([] if failing else ["0.png", "1.png"])


def test_a_signal_while_the_end_waits_drops_the_queue_too(tmp_path, monkeypatch):
    writer, calls = ImageWriter(threads=1), []

    def shutdown(wait: bool, cancel_futures: bool) -> None:
        calls.append(cancel_futures)
        if len(calls) == 1:
            raise Terminated
    monkeypatch.setattr(writer.pool, "shutdown", shutdown)
    with pytest.raises(Terminated), writer:
        pass
    assert calls == [False, True]


def test_looking_is_fast(tmp_path, png):
    complete(tmp_path, png)
    began = time.perf_counter()
    for _ in range(20):
        assert is_complete_png(tmp_path / "x.png")
    assert (time.perf_counter() - began) / 20 < 0.02  # s, for 130 kB of noise in several chunks
