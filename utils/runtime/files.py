"""Whole files or none: atomic writes, readers that never run code, digests."""
import csv
import difflib
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from utils.runtime import foreign_arrays
from utils.runtime.errors import UserError

# ---- atomic writes ---------------------------------------------------------------------------------------------------

HOST = re.sub(r"[^\w.]", "_", platform.node(), flags=re.ASCII)[:64]
STARTED = time.time()
DAY = 86400  # seconds
PART = re.compile(r"\.(?P<host>[\w.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.part", re.ASCII)  # who writes; earlier versions named the file


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path to write to; on success fsync it and rename it to `path`, on failure remove it.

    A reader therefore sees the whole file or none, even after a kill or on a full disk. The temporary name fits whatever
    the length of the file's own; `sweep` removes what a kill leaves.
    """
    path = Path(path)
    temporary = path.with_name(f".{HOST}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # name the file the user knows, not the temporary one
        raise
    with suppress(OSError):  # not every system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path | str) -> None:
    """Remove, anywhere in a folder, what killed processes were writing: never the parts of processes that live.

    Parts of other hosts, and of earlier versions, are removed when they are a day old.
    """
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                with suppress(OSError):  # another sweep was faster, or it is not ours to remove
                    if _is_stale(Path(where, name)):
                        os.unlink(os.path.join(where, name))


def _is_stale(part: Path) -> bool:
    found, written = PART.fullmatch(part.name), part.lstat().st_mtime
    if not found or found["host"] != HOST:
        return written < time.time() - DAY
    pid = int(found["pid"])
    if pid == os.getpid():  # processes of containers are often all number 1
        return written < STARTED
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def write_bytes(path: Path | str, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """UTF-8; file names that are not come out as the bytes that they are. Read it with errors="surrogateescape" too."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Lines end in \\n; a name with \\r in it is quoted too, which csv does only where \\r ends lines."""
    writer = csv.writer(SimpleNamespace(write=lambda line: line.removesuffix("\r\n") + "\n"), lineterminator="\r\n")
    write_text(path, "".join(map(writer.writerow, (header, *rows))))


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def write_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    write_bytes(path, safetensors_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def write_torch(path: Path | str, value: Any) -> None:
    """Save tensors, numbers, strings and containers of them: readable with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


# ---- reading ---------------------------------------------------------------------------------------------------------

def require_file(path: Path | str, setting: str, fix: str) -> Path:
    """`path` if it is a file.

    Raises:
        UserError: it is not; the line names `setting`, the file and the `fix`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({setting}); {fix}")
    return path


def read_names(path: Path | str, setting: str, known: Iterable[str]) -> set[str]:
    """Those of the `known` names that a list has, one per line; UTF-8 with or without a byte order mark.

    Names are compared in Unicode's normal form C: file systems and editors write one name in two ways.

    Raises:
        UserError: there is no such file, it is not UTF-8, or a line is none of the known names.
    """
    path = require_file(path, setting, "give a list with one name per line")
    lines = foreign_arrays.read_text(path, "list").splitlines()
    by_form, names = defaultdict(set), set()
    for name in known:
        by_form[unicodedata.normalize("NFC", name)].add(name)
    for number, line in enumerate(lines, start=1):
        name = unicodedata.normalize("NFC", line.strip())
        if name and name not in by_form:
            near = difflib.get_close_matches(name, by_form, n=1) if len(name) * len(by_form) < 10**6 else []  # slow
            raise UserError(f"{path}:{number}: {name[:200]!r} is not there to be chosen ({setting}); "
                            + (f"did you mean {near[0]!r}?" if near else "correct or remove that line"))
        if name:
            names |= by_form[name]
    return names


def read_json(path: Path | str, fix: str = "restore it, or delete it and run again the stage that wrote it") -> Any:
    """What a JSON file holds; names of files that are not UTF-8 come back as `write_text` took them.

    Raises:
        UserError: the file is not JSON, or holds numbers that are not finite.
    """
    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is no number")
        return float(text)

    foreign_arrays.require_regular(path)
    with foreign_arrays.reading(path, "valid JSON", fix):
        text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
        return json.loads(text, parse_float=finite, parse_constant=finite)


def read_npz(path: Path | str, keys: Sequence[str],
             fix: str = "delete it and run again the stage that wrote it, or get it again where it is not this project's"
             ) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz file, never unpickling anything, nor taking memory that its size does not justify.

    Raises:
        UserError: the file is damaged, is no .npz, or lacks one of the arrays.
    """
    with foreign_arrays.reading(path, "a readable .npz file", fix):
        arrays = foreign_arrays.read_npz(path, keys)
        for key in keys:
            if key not in arrays:
                raise UserError(f"{path}: holds no array '{key}'; {fix}")
        return arrays


def file_digest(path: Path | str, most: int = foreign_arrays.MOST_BYTES) -> str:
    """SHA-256 of a file's bytes, hex. Raises UserError where it is no regular file, or has more than `most` bytes."""
    foreign_arrays.require_regular(path, most)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text, hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def array_digest(*arrays: np.ndarray) -> str:
    """SHA-256 over the arrays' types, shapes and values, hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
