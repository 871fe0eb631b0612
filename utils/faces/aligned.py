"""The folder of aligned faces: which images failed and why, what each was made from, and which faces are kept."""
import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import places
from utils.faces.folders import select
from utils.faces.images import read_image
from utils.faces.template import SIZE
from utils.runtime.errors import UserError
from utils.runtime.files import file_digest, require_file, write_csv
from utils.runtime.foreign_arrays import require_regular
from utils.runtime.records import decided, note, noted

LISTS = {"failures": ("identity", "image", "reason"), "sources": ("identity", "image", "sha256")}
KEPT_COLUMNS = ("identity", "image")
MOST_LIST = 2**30  # bytes; of 10 million images
ALIGN_AGAIN = "run align.py with another paths.run, which writes that record too"

Values = Mapping[tuple[str, str], str]  # (identity, image) -> reason, or the digest of what the image was


def image_key(image: Path) -> tuple[str, str]:
    """How failures.csv names an image: identity and file name."""
    return image.parent.name, image.name


def output_files(folders: Mapping[str, Sequence[Path]], aligned: Path) -> dict[Path, Path]:
    """Each image's aligned face. Raises UserError where two images would be one face."""
    outputs = {}
    for identity, images in folders.items():
        sources = {}
        for image in images:
            other = sources.setdefault(image.stem, image)
            if other is not image:
                raise UserError(f"{image}: would be aligned to the same file as {other.name}; rename one of them")
            outputs[image] = aligned / identity / f"{image.stem}.png"
    return outputs


def write_list(folder: Path, name: str, values: Values, rank: int | None = None) -> None:
    """Write <name>.csv, one of LISTS, or what one process has to say, for merge."""
    file = folder / (f"{name}.csv" if rank is None else f"{name}.rank{rank}.csv")
    write_csv(file, LISTS[name], [(*image, value) for image, value in sorted(values.items())])


def write_lists(aligned: Path, failures: Values, sources: Values, rank: int) -> None:
    """Write what a process has done so far; the sources last, since an image that has one is done."""
    write_list(aligned, "failures", failures, rank)
    write_list(aligned, "sources", sources, rank)


def read_list(file: Path, name: str) -> dict[tuple[str, str], str]:
    """Raises UserError where the file is not one that write_list made."""
    return {(identity, image): value for identity, image, value in _read_rows(file, LISTS[name])}


def merge(aligned: Path, images: Collection[tuple[str, str]]) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]:
    """Bring what all ranks say, of this run and of killed ones, together in failures.csv and sources.csv.

    Args:
        images: those that are still there; others are forgotten.
    Returns:
        Failures and sources.
    """
    parts = {name: sorted(aligned.glob(f"{name}.rank*.csv")) for name in LISTS}
    said = {name: {key: value for part in parts[name] for key, value in read_list(part, name).items()} for name in LISTS}
    merged = {}
    for name in LISTS:
        file = aligned / f"{name}.csv"
        earlier = read_list(file, name) if file.is_file() else {}
        # what was done anew has its source among the parts, and what is said of it before does not count any more
        earlier = {image: value for image, value in earlier.items() if image not in said["sources"]}
        merged[name] = {image: value for image, value in (earlier | said[name]).items() if image in images}
    for name in LISTS:
        write_list(aligned, name, merged[name])
    for part in (*parts["sources"], *parts["failures"]):
        part.unlink()
    return merged["failures"], merged["sources"]


def keep(faces: Mapping[str, Sequence[Path]], identities: int, images: int) -> dict[str, list[Path]]:
    """The first `images` faces of each of the first `identities` identities that have that many; 0: all of them."""
    return select({name: files for name, files in faces.items() if len(files) >= max(images, 1)}, identities, images)


def write_kept(aligned: Path, kept: Mapping[str, Sequence[Path]], **about: Any) -> None:
    """Write the kept selection: kept.csv in the folder of aligned faces, whose record notes what is in it.

    Args:
        about: what else it notes, such as the settings by which these faces were selected.
    """
    file = aligned / "kept.csv"
    write_csv(file, KEPT_COLUMNS, [(name, image.name) for name, images in kept.items() for image in images])
    note(places.alignment_record(aligned), kept=file_digest(file), **about)


def read_kept(aligned: Path) -> dict[str, list[Path]]:
    """The kept selection of a folder of aligned faces: identity -> its images, in the order they were kept.

    Raises:
        UserError: kept.csv is missing or damaged, is not the one that align.py wrote, or nothing was kept.
    """
    rows = _read_rows(aligned / "kept.csv", KEPT_COLUMNS)
    if noted(places.alignment_record(aligned), "kept") not in (None, file_digest(aligned / "kept.csv")):
        raise UserError(f"{aligned / 'kept.csv'}: is not the list that align.py wrote; run align.py again (what is kept is up to "
                        "align.keep_identities and align.keep_images)")
    kept: dict[str, list[Path]] = {}
    for identity, image in rows:
        kept.setdefault(identity, []).append(aligned / identity / image)
    if not kept:
        raise UserError(f"{aligned / 'kept.csv'}: no identity had enough faces, or any (failures.csv says why); lower "
                        "align.keep_images or align.minimum_face, and run align.py again")
    return kept


def alignment_setting(aligned: Path, name: str, fix: str = ALIGN_AGAIN) -> str:
    """What align.<name> was for a folder of aligned faces. Raises UserError where its record does not say."""
    return decided(places.alignment_record(aligned), (f"align.{name}",), fix)[f"align.{name}"]


def _read_rows(file: Path, columns: Sequence[str]) -> list[list[str]]:
    require_file(file, "aligned faces", "run align.py")
    require_regular(file, MOST_LIST)
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as opened:
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
