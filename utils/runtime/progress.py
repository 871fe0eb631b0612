"""What a long stage is about to make, how long that takes, and what it took."""
import math
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils.runtime.errors import NO_SPACE, UserError
from utils.runtime.ranks import Ranks

BLOCK = 4096  # bytes: what the shortest file takes on most file systems
FIRST_SECONDS = 10  # of a stage, from which its length is estimated
WORTH_SAYING = 1  # second: what takes, or goes on for, less needs no line


def announce(stage: str, items: float, unit: str, target: Path, item_size: float, files: int | None = None,
             ranks: Ranks | None = None) -> None:
    """Say what a stage is about to make, before it starts, and refuse it where the disk is too small.

    Args:
        stage: its name.
        items, unit: what it does, as 192 images.
        target: the file or folder that it writes.
        item_size: bytes that an item takes there, about.
        files: how many it writes there; by default a file for each item.
        ranks: the processes that share the work, of which this one's part is `items`; by default it is alone.
    Raises:
        UserError: the disk has less room than that.
    """
    items = ranks.sum([items])[0] if ranks else items
    if items <= 0:
        return
    size = items * (item_size if files else math.ceil(item_size / BLOCK) * BLOCK)
    place = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    text = f"{items:,.0f} {unit}, {files or items:,.0f} files, about {in_bytes(size)}"
    if size > free:
        raise UserError(f"{target}: {stage} needs more room than the {in_bytes(free)} free there ({text}); {NO_SPACE}")
    if not ranks or ranks.is_main:
        print(f"{stage}: {text} of the {in_bytes(free)} free at {target}", flush=True)


class StageBar(tqdm):
    """tqdm's bar, which also says once how long the stage takes, by its first seconds, and at the end what it took."""

    def __init__(self, *args, **kwargs) -> None:
        self.began, self.first, self.is_estimated = time.monotonic(), None, False
        super().__init__(*args, **kwargs)

    def update(self, n: float = 1) -> bool | None:
        shown, now = super().update(n), time.monotonic()
        if self.disable or self.is_estimated:
            return shown
        if self.first is None:  # what comes before, a compiler for one, does not recur
            self.first = self.n, now
        elif now - self.first[1] >= FIRST_SECONDS and self.first[0] < self.n < self.total:
            self.is_estimated = True
            left = (self.total - self.n) / (self.n - self.first[0]) * (now - self.first[1])
            if left >= WORTH_SAYING:
                self._say(f"about {in_time(left)} to go, by the speed of its first {in_time(now - self.began)}")
        return shown

    def close(self) -> None:
        is_open, seconds = not self.disable, time.monotonic() - self.began
        super().close()
        if is_open and self.first and self.n > self.total * (1 - 1e-9) and seconds >= WORTH_SAYING:
            self._say(f"took {in_time(seconds)}")

    def _say(self, text: str) -> None:
        self.write(f"{str(self.desc).removesuffix(': ')}: {text}", file=sys.stdout)
        sys.stdout.flush()


def in_time(seconds: float) -> str:
    """`42 s`, `7 min` or `3.2 hours`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def in_bytes(size: float) -> str:
    """`12 MB`: powers of ten, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
