"""What a stage says of itself: the room it needs, how long it takes, what it took."""
import shutil
from collections import namedtuple

import pytest

from utils.runtime import progress
from utils.runtime.errors import UserError
from utils.runtime.progress import StageBar, announce, in_bytes, in_time

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch):
    """The free bytes of every disk."""
    def set_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, free))
    return set_free


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on where the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_files_take_whole_blocks(tmp_path, disk, capsys):
    disk(3 * 4096)
    announce("sample", 3, "images", tmp_path / "not" / "there", 100)
    assert capsys.readouterr().out == f"sample: 3 images, 3 files, about 12.3 kB of the 12.3 kB free at {tmp_path}/not/there\n"
    with pytest.raises(UserError, match=r"not/there: sample needs more room than the 12.3 kB free there \(4 images, 4 files, "
                                        r"about 16.4 kB\); free space or choose another paths.output, then run"):
        announce("sample", 4, "images", tmp_path / "not" / "there", 100)
    assert not (tmp_path / "not").exists()


def test_many_items_in_one_file_take_what_they_take(tmp_path, disk, capsys):
    disk(1000)
    announce("packing", 10, "faces", tmp_path / "faces.npy", 100, files=1)
    assert "10 faces, 1 files, about 1 kB" in capsys.readouterr().out
    with pytest.raises(UserError):
        announce("packing", 10, "faces", tmp_path / "faces.npy", 100.1, files=1)


def test_nothing_left_is_not_announced(tmp_path, disk, capsys):
    disk(0)
    announce("sample", 0, "images", tmp_path, 100)
    assert capsys.readouterr().out == ""


def test_the_estimate_leaves_out_what_comes_before_the_first_item(clock, capsys):
    with StageBar(total=1000, desc="sample") as bar:
        clock(500)  # a compiler
        for _ in range(12):
            bar.update(10)
            clock(1)
        assert capsys.readouterr().out == "sample: about 1 min to go, by the speed of its first 8 min\n"
        bar.update(880)
    assert capsys.readouterr().out == "sample: took 9 min\n"


@pytest.mark.parametrize("done", [0, 9])
def test_a_stage_that_was_stopped_or_had_nothing_to_do_took_nothing(clock, capsys, done):
    with StageBar(total=10 if done else 0) as bar:
        clock(60)
        bar.update(done) if done else None
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent(clock, capsys):
    with StageBar(total=2, disable=True) as bar:
        bar.update(1)
        clock(60)
        bar.update(1)
    assert capsys.readouterr().out == ""


def test_lengths_and_sizes():
    assert [in_time(s) for s in (0.4, 59.4, 60, 5399, 5400)] == ["0 s", "59 s", "1 min", "90 min", "1.5 hours"]
    assert [in_bytes(b) for b in (0, 999, 1000, 123456, 3.46e9, 2e15)] == ["0 bytes", "999 bytes", "1 kB", "123 kB", "3.46 GB",
                                                                          "2e+03 TB"]
