"""Files that are written: whole or not at all, under any name, and with nothing left behind."""
import csv
import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.runtime import files
from utils.runtime.files import atomic_write, sweep, text_digest, write_bytes, write_csv, write_json, write_text

NOT_UTF8 = os.fsdecode(b"caf\xe9.jpg")


@pytest.mark.parametrize("name", ["a", "a" * 251 + ".png", os.fsdecode(b"\xff" * 255), "é" * 127, ".hidden", "with\nline"])
def test_names_of_any_length_are_written(tmp_path, name):
    write_bytes(tmp_path / "new" / name, b"data")
    write_bytes(tmp_path / "new" / name, b"other")
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "new").iterdir()] == [(name, b"other")]


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    write_bytes(tmp_path / "a", b"before")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        assert files.PART.fullmatch(temporary.name)["pid"] == str(os.getpid())
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"before"


def write_to(place: str, tmp_path: Path) -> Path:
    """A path that cannot be written to."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    return {"in a file": tmp_path / "file" / "x", "in a device": Path("/dev/null/x"), "a folder": tmp_path / "folder",
            "in a loop": tmp_path / "loop" / "x", "in a dangling link": tmp_path / "dangling" / "x",
            "too long": tmp_path / ("a" * 256), "a long path": Path("/" + "a/" * 2500)}[place]


@pytest.mark.parametrize("place, numbers", [
    ("in a file", {errno.ENOTDIR, errno.EEXIST}), ("in a device", {errno.ENOTDIR, errno.EEXIST}), ("a folder", {errno.EISDIR}),
    ("in a loop", {errno.ELOOP, errno.EEXIST}), ("in a dangling link", {errno.EEXIST, errno.ENOENT}),
    ("too long", {errno.ENAMETOOLONG}), ("a long path", {errno.ENAMETOOLONG})])
def test_what_cannot_be_written_is_named_by_the_name_that_the_user_knows(tmp_path, place, numbers):
    path = write_to(place, tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError) as error:
        write_bytes(path, b"data")
    assert error.value.errno in numbers and error.value.filename in map(str, (path, *path.parents))
    assert sorted(os.listdir(tmp_path)) == before


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.binary(max_size=9).map(os.fsdecode)), max_size=4))
def test_tables_and_texts_give_back_any_file_name(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "table.csv"
    write_csv(file, ("identity", "image"), rows)
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as opened:
        assert list(csv.reader(opened)) == [["identity", "image"], *map(list, rows)]


def test_tables_end_lines_as_before_and_keep_bytes_that_are_not_utf_8(tmp_path):
    write_csv(tmp_path / "a.csv", ("n", "x"), [(1, None), (NOT_UTF8, 'a,"b"'), ("a\rb", "c\nd")])
    assert (tmp_path / "a.csv").read_bytes() == b'n,x\n1,\ncaf\xe9.jpg,"a,""b"""\n"a\rb","c\nd"\n'
    write_text(tmp_path / "a.txt", f"é {NOT_UTF8}\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "é ".encode() + b"caf\xe9.jpg\r\n"
    write_json(tmp_path / "a.json", {NOT_UTF8: 1})
    assert (tmp_path / "a.json").read_bytes() == b'{\n "caf\xe9.jpg": 1\n}\n'


def test_digests_take_any_file_name():
    assert text_digest("Zoë") == hashlib.sha256("Zoë".encode()).hexdigest()
    assert text_digest(NOT_UTF8) == hashlib.sha256(b"caf\xe9.jpg").hexdigest()


# ---- what kills leave behind -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def part(folder: Path, host: str, pid: int, days_old: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{host}-{pid}-0123abcd.part"
    file.write_bytes(b"half")
    os.utime(file, (time.time() - 86400 * days_old,) * 2)
    return file


def test_parts_of_dead_processes_are_swept_and_those_of_living_ones_are_not(tmp_path, ended_process):
    dead = [part(tmp_path, files.HOST, ended_process), part(tmp_path / "samples" / "a", files.HOST, ended_process),
            part(tmp_path, files.HOST, 10**30), part(tmp_path, "elsewhere", 1, days_old=1.1),
            part(tmp_path, files.HOST, os.getpid(), days_old=0.5)]  # of an earlier process of that number
    alive = [part(tmp_path, files.HOST, os.getppid(), days_old=3), part(tmp_path, "elsewhere", ended_process),
             part(tmp_path, "else-where", 12, days_old=0.9)]
    earlier_version, recent = tmp_path / ".0.png.k3j_2d.part", tmp_path / ".1.png.k3j_2d.part"
    for file in (earlier_version, recent, tmp_path / "a.part", tmp_path / ".hidden"):
        file.write_bytes(b"")
    for file in (earlier_version, tmp_path / "a.part", tmp_path / ".hidden"):
        os.utime(file, (0, 0))
    with atomic_write(tmp_path / "in hand") as temporary:
        temporary.write_bytes(b"data")
        sweep(tmp_path)
    assert not any(file.exists() for file in (*dead, earlier_version))
    assert all(file.exists() for file in (*alive, recent, tmp_path / "a.part", tmp_path / ".hidden", tmp_path / "in hand"))


def test_sweeping_stays_inside_the_folder(tmp_path, ended_process):
    outside = part(tmp_path / "outside", files.HOST, ended_process)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "run" / f".{files.HOST}-{ended_process}-0123abcd.part").mkdir()  # a folder is nobody's part
    sweep(tmp_path / "run")
    sweep(tmp_path / "absent")
    assert outside.exists() and len(list((tmp_path / "run").iterdir())) == 2


def test_a_kill_leaves_a_part_that_is_swept(tmp_path):
    pid = os.fork()
    if pid == 0:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert len(os.listdir(tmp_path)) == 1
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []
