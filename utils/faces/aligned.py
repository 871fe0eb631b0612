"""The folder of aligned faces: which images failed and why, and which faces are kept."""
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.faces.folders import read_image, select
from utils.faces.template import SIZE
from utils.runtime.errors import UserError
from utils.runtime.files import require_file, write_csv

FAILURE_COLUMNS = ("identity", "image", "reason")
KEPT_COLUMNS = ("identity", "image")

Failures = Mapping[tuple[str, str], str]  # (identity, image) -> reason


def write_failures(aligned: Path, failures: Failures, rank: int | None = None) -> None:
    """Write failures.csv or, given a rank, what failed in that process alone, for merge_failures."""
    name = "failures.csv" if rank is None else f"failures.rank{rank}.csv"
    write_csv(aligned / name, FAILURE_COLUMNS, [(*image, reason) for image, reason in sorted(failures.items())])


def read_failures(file: Path) -> dict[tuple[str, str], str]:
    """Raises UserError where the file is not one that write_failures made."""
    return {(identity, image): reason for identity, image, reason in _read_rows(file, FAILURE_COLUMNS)}


def merge_failures(aligned: Path) -> dict[tuple[str, str], str]:
    """Bring what failed in all ranks, of this run and of killed ones, together in failures.csv, and return it."""
    merged, parts = aligned / "failures.csv", sorted(aligned.glob("failures.rank*.csv"))
    failures = read_failures(merged) if merged.is_file() else {}
    for part in parts:
        failures |= read_failures(part)
    write_failures(aligned, failures)
    for part in parts:
        part.unlink()
    return failures


def keep(faces: Mapping[str, Sequence[Path]], identities: int, images: int) -> dict[str, list[Path]]:
    """The first `images` faces of each of the first `identities` identities that have that many; 0: all of them."""
    return select({name: files for name, files in faces.items() if len(files) >= max(images, 1)}, identities, images)


def write_kept(aligned: Path, kept: Mapping[str, Sequence[Path]]) -> None:
    """Write the kept selection: kept.csv in the folder of aligned faces."""
    write_csv(aligned / "kept.csv", KEPT_COLUMNS, [(name, file.name) for name, files in kept.items() for file in files])


def read_kept(aligned: Path) -> dict[str, list[Path]]:
    """The kept selection of a folder of aligned faces: identity -> its images, in the order they were kept.

    Raises:
        UserError: kept.csv is missing or damaged, or nothing was kept.
    """
    kept: dict[str, list[Path]] = {}
    for identity, image in _read_rows(aligned / "kept.csv", KEPT_COLUMNS):
        kept.setdefault(identity, []).append(aligned / identity / image)
    if not kept:
        raise UserError(f"{aligned / 'kept.csv'}: no identity had enough faces; lower align.keep_images and run align.py "
                        "again")
    return kept


def _read_rows(file: Path, columns: Sequence[str]) -> list[list[str]]:
    require_file(file, "aligned faces", "run align.py")
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            header, *rows = csv.reader(opened)
        if header != list(columns) or any(len(row) != len(columns) for row in rows):
            raise ValueError(f"its columns should be {', '.join(columns)}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: is damaged ({error}); delete it and run align.py again") from None
    return rows


def read_aligned(file: Path | str) -> np.ndarray:
    """An aligned face, uint8 [112, 112, 3] RGB. Raises UserError where it is unreadable or of another size."""
    image = read_image(Path(file))
    if image.shape[:2] != (SIZE, SIZE):
        raise UserError(f"{file}: is {image.shape[1]} x {image.shape[0]} px, not {SIZE} x {SIZE}; run align.py and give the "
                        "folder it writes")
    return image
