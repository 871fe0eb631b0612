"""Batches that memory is too small for are made a half at a time, and it is noted which: their bytes may differ."""
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from utils.runtime.errors import UserError, is_out_of_memory
from utils.runtime.files import write_json

T = TypeVar("T")
NAME = "smaller_batches-{}.json"


class SmallerBatches:
    """How many items of a batch are made at a time: all of them, or as many as there is memory for.

    Args:
        folder: where each rank notes its batches that were made in parts.
        rank: of this process.
        size: items of a batch.

    Attributes:
        noted: the number of a batch -> how many of its items were made at a time, by any rank, now or before.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.file, self.size, self.full = folder / NAME.format(rank), size, size
        self.mine, self.noted = _read(self.file) if self.file.is_file() else {}, read_smaller_batches(folder)

    def make(self, number: int, make: Callable[[int], T]) -> T:
        """`make(items at a time)` for batch `number`; where memory runs out half as many, then and for the batches to come.

        What was made in parts before is made in the same parts again, so that a continued run has the same bytes.
        """
        size = min(self.size, self.noted.get(number, self.full))
        while True:
            try:
                made = make(size)
                break
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.size = size = (size + 1) // 2  # out of the except block: the error's frames hold the tensors
            print(f"out of memory: from here on {size} images are drawn at a time, not {self.full}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if size < self.full and self.noted.get(number) != size:
            self.noted[number] = self.mine[number] = size
            write_json(self.file, self.mine)  # before any of it is written
        return made


def read_smaller_batches(folder: Path) -> dict[int, int]:
    """The batches that any rank made in parts, and how many items at a time. Raises UserError where a note is damaged."""
    noted: dict[int, int] = {}
    for file in sorted(folder.glob(NAME.format("*"))):
        for number, size in _read(file).items():
            noted[number] = min(size, noted.get(number, size))
    return noted


def _read(file: Path) -> Mapping[int, int]:
    try:
        noted = {int(number): int(size) for number, size in json.loads(file.read_text(encoding="utf-8")).items()}
        if any(size < 1 for size in noted.values()):
            raise ValueError("a size is below 1")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is damaged ({str(error)[:100]}); delete it, and images that are missing may differ in their "
                        "last bits") from None
    return noted
