"""Whole files or none: atomic writes, readers that never run code, digests."""
import csv
import difflib
import hashlib
import io
import json
import os
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from utils.runtime.errors import UserError

# ---- atomic writes ---------------------------------------------------------------------------------------------------

@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path to write to; on success fsync it and rename it to `path`, on failure remove it.

    A reader therefore sees the whole file or none, even after a kill or on a full disk.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private; results are to be read by whoever the user's umask lets read them.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # name the file the user knows, not the temporary one
        raise


def write_bytes(path: Path | str, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def write_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor],
                      metadata: Mapping[str, str] | None = None) -> None:
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors_bytes(data, dict(metadata) if metadata else None))


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
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save the list as UTF-8") from None
    by_form = {unicodedata.normalize("NFC", name): name for name in known}
    names = set()
    for number, line in enumerate(lines, start=1):
        name = unicodedata.normalize("NFC", line.strip())
        if name and name not in by_form:
            near = difflib.get_close_matches(name, by_form, n=1)
            raise UserError(f"{path}:{number}: '{name}' is not there to be chosen ({setting}); "
                            + (f"did you mean '{near[0]}'?" if near else "correct or remove that line"))
        if name:
            names.add(by_form[name])
    return names


def read_json(path: Path | str) -> Any:
    """Raises UserError where the file is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); delete it and run the stage that writes it") from None


def read_npz(path: Path | str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `keys` of an .npz file, never unpickling anything.

    Raises:
        UserError: the file is damaged, is no .npz, or lacks one of the arrays.
    """
    fix = "delete it and run the stage that writes it again"
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise UserError(f"{path}: holds no array '{missing[0]}'; {fix}")
            return {key: archive[key] for key in keys}
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: is not a readable .npz file ({error}); {fix}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not a readable .npz file ({error}); {fix}") from None


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def array_digest(*arrays: np.ndarray) -> str:
    """SHA-256 over the arrays' types, shapes and values, hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
