"""Writing PNGs in the background, so that the device never waits for a disk."""
import io
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from utils.faces.images import MOST_BYTES
from utils.runtime.errors import UserError
from utils.runtime.files import write_bytes

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_BYTES = 2.2  # of a PNG: generated faces at 64 px take 1.8 bytes a pixel, aligned ones at 112 px 1.3


def png_size(width: int) -> float:
    """About the bytes of a square face as a PNG, rather too many than too few."""
    return PIXEL_BYTES * width**2


def is_complete_png(file: Path) -> bool:
    """Whether a file is a PNG whose chunks are all there and as they were written: a torn or altered one is not done."""
    try:
        return file.is_file() and file.stat().st_size <= MOST_BYTES and _is_whole(file.read_bytes())
    except OSError:
        return False


def require_complete(files: Iterable[Path], folder: Path, made: str, what: str) -> None:
    """Raises UserError where a file that was made is not whole, or not there; `made`, `what`: words for the line."""
    if lost := [file for file in files if not is_complete_png(file)]:
        raise UserError(f"{lost[0]}: is not there though it was {made} ({len(lost)} {what} are missing): something else removes "
                        f"files from {folder}; stop that, and run the same command again")


def _is_whole(png: bytes) -> bool:
    place, kinds, pixels = len(SIGNATURE), [], []
    while png.startswith(SIGNATURE) and place < len(png):
        size = int.from_bytes(png[place : place + 4])
        kind, body, end = png[place + 4 : place + 8], place + 8, place + 12 + size
        if end > len(png) or zlib.crc32(memoryview(png)[place + 4 : end - 4]) != int.from_bytes(png[end - 4 : end]):
            return False
        if kind == b"IDAT":
            pixels.append(png[body : body + size])
        kinds.append(kind)
        place = end
    return (kinds[:1] == [b"IHDR"] and kinds[-1] == b"IEND" and kinds.count(b"IEND") == 1
            and (len(pixels) == 1 or _is_whole_stream(pixels)))


def _is_whole_stream(pixels: list[bytes]) -> bool:
    """Whether pixels in several chunks end as they should: whole chunks may be missing between."""
    stream = zlib.decompressobj()
    try:
        for piece in pixels:
            while piece:  # a piece at a time, whatever it grows to
                stream.decompress(piece, 2**20)
                piece = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof


class ImageWriter:
    """Threads that write images atomically. Leaving the `with` block waits for all; a failed write is raised there or
    at a later `write`, so it is never lost. Left by an error, it finishes the files in hand and drops those that wait."""

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
        try:
            self.pool.shutdown(wait=True, cancel_futures=error is not None)
        except BaseException:  # a signal while it waits
            self.pool.shutdown(wait=True, cancel_futures=True)
            raise
        if error is None or isinstance(error, Exception):  # after a signal the next run writes what is missing
            for written in self.pending:
                if not written.cancelled():
                    written.result()


def _write(file: Path, pixels: np.ndarray) -> None:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    write_bytes(file, png.getvalue())
