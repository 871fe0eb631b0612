"""Writing PNGs in the background, so that the device never waits for a disk."""
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from utils.runtime.files import write_bytes

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def is_complete_png(file: Path) -> bool:
    """Whether the file exists and ends as a PNG ends: half a copy does not count as done."""
    try:
        with open(file, "rb") as opened:
            opened.seek(-len(PNG_END), 2)
            return opened.read() == PNG_END
    except OSError:
        return False


class ImageWriter:
    """Threads that write images atomically. Leaving the `with` block waits for all; a failed write is raised there or
    at a later `write`, so it is never lost."""

    def __init__(self, threads: int = 4, waiting: int = 256):
        self.pool = ThreadPoolExecutor(threads)
        self.waiting = waiting
        self.pending: deque[Future] = deque()

    def write(self, file: Path, pixels: np.ndarray) -> None:
        """Queue an RGB image, uint8 [H, W, 3]; waits while too many are queued."""
        while self.pending and (self.pending[0].done() or len(self.pending) >= self.waiting):
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(_write, file, pixels))

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.pool.shutdown(wait=True, cancel_futures=error is not None)
        while self.pending and error is None:
            self.pending.popleft().result()


def _write(file: Path, pixels: np.ndarray) -> None:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    write_bytes(file, png.getvalue())
