"""Memory-mapped arrays on a disk that is too small: an error in one line, where writing to them would be a crash."""
import os
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.faults.processes import forked
from utils.training.faces import cached_array, open_array

ROWS = 2000  # of 1000 bytes


@pytest.fixture
def disk(tmp_path) -> Path:
    """One of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, rows: int = ROWS) -> np.ndarray:
    def write(file: Path) -> None:
        array = open_array(file, np.uint8, (rows, 1000))
        array[:] = 7
        array.flush()
    return cached_array(folder / "crops.npy", {"rows": rows}, write)


def test_a_full_disk_is_one_line_and_no_crash(disk):
    code, printed = forked(lambda: fill(disk))
    assert code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"error: {disk / 'crops.npy'}: No space left on device; free space or choose another paths.output")
    assert sorted(os.listdir(disk)) == ["crops.json"]
    assert (fill(disk, 500) == 7).all()  # with less to write, the next run goes on


def test_a_limit_on_files_is_one_line(tmp_path):
    code, printed = forked(lambda: fill(tmp_path), prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)))
    assert code == 2 and printed.startswith(f"error: {tmp_path / 'crops.npy'}: File too large; raise the limit")
    assert sorted(os.listdir(tmp_path)) == ["crops.json"]
    assert (fill(tmp_path) == 7).all()
    assert (tmp_path / "crops.npy").stat().st_blocks * 512 >= ROWS * 1000  # nothing is left to be found later
