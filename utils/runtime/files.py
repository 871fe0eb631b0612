"""Every artifact's place, atomic writes, and the record that lies beside every output.

No other module builds a path inside the output root, so the stages cannot disagree about where things are.
"""
import csv
import hashlib
import io
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from config.config import Config
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

def require_file(path: Path | str, setting: str, mend: str) -> Path:
    """`path` if it is a file.

    Raises:
        UserError: it is not; the line names `setting`, the file and the `mend`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({setting}); {mend}")
    return path


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
    mend = "delete it and run the stage that writes it again"
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise UserError(f"{path}: holds no array '{missing[0]}'; {mend}")
            return {key: archive[key] for key in keys}
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: is not a readable .npz file ({error}); {mend}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is not a readable .npz file ({error}); {mend}") from None


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recogniser_digest(path: Path | str) -> str:
    """The digest of a recogniser's file; of one in ncnn's format, whose weights lie beside it, of both files."""
    path = Path(path)
    digest = file_digest(path)
    return text_digest(digest + file_digest(path.with_suffix(".bin"))) if path.suffix == ".param" else digest


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


# ---- the record of a run ---------------------------------------------------------------------------------------------

def versions() -> dict[str, str]:
    """The versions that can change a result."""
    packages = ("torch", "torchvision", "diffusers", "numpy", "opencv-python-headless")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def claim_run(record_file: Path, decides: Mapping[str, Any], record: Mapping[str, Any],
              named_by: str = "paths.run") -> None:
    """Write a run's record, or check that the run begun here earlier was made with the same deciding settings.

    Args:
        record_file: the JSON file beside the output.
        decides: what decides the output (settings, digests); a continued run must agree in every entry.
        record: the rest that is worth keeping: the whole resolved config, versions, hardware.
        named_by: the setting that names the folder, for the message.
    Raises:
        UserError: the folder holds a run made with other settings; the line names the first that differs.
    """
    decides = json.loads(json.dumps(decides))
    if record_file.is_file():
        earlier = read_json(record_file).get("decides", {})
        for name in sorted(decides.keys() | earlier.keys()):
            if decides.get(name) != earlier.get(name):
                raise UserError(f"{record_file.parent}: was made with {name} = {earlier.get(name)!r}, now it is "
                                f"{decides.get(name)!r}; set {named_by} to another name, or delete that folder")
        return
    write_json(record_file, {"decides": decides, **record, "versions": versions()})


# ---- places ----------------------------------------------------------------------------------------------------------

def contexts_name(config: Config) -> str:
    """The name that the contexts' settings make: files of other contexts never meet."""
    contexts = config.contexts
    if contexts.name:
        return contexts.name
    if contexts.source == "uniform":
        return f"uniform-{contexts.number}x{contexts.dimension}-seed{contexts.seed}"
    if contexts.source == "gaussian":
        return f"gaussian-{contexts.number}-seed{contexts.seed}"
    if contexts.source == "published":
        return f"published-{Path(contexts.file).stem}"
    return f"extracted-{Path(contexts.faces).name}-{Path(contexts.recogniser).stem}-per-{contexts.per}"


def contexts_file(config: Config) -> Path:
    return Path(config.paths.output) / "contexts" / f"{contexts_name(config)}.npz"


def negatives_file(config: Config) -> Path:
    return contexts_file(config).with_suffix(f".negatives-{config.negatives.strategy}.npz")


def run_folder(config: Config) -> Path:
    """The folder of a run; its name says what makes its images differ (w = 0 has no strategy)."""
    if config.paths.run:
        return Path(config.paths.output) / config.paths.run
    guidance, sampling = config.guidance, config.sampling
    schedule = guidance.schedule
    if schedule == "interval":
        schedule += "{}to{}".format(*guidance.interval)
    guided = f"{config.negatives.strategy}_w{guidance.w:g}-{schedule}" if guidance.w else "w0"
    solver = f"{sampling.solver}{sampling.steps}" + ("-published" if sampling.as_published else "")
    name = f"{Path(config.model.diffusion).name}_{contexts_name(config)}_{guided}_{solver}_seed{sampling.seed}"
    return Path(config.paths.output) / config.preset / name


def samples_folder(config: Config) -> Path:
    return run_folder(config) / "samples"


def aligned_folder(config: Config) -> Path:
    return run_folder(config) / "aligned"


def scores_folder(config: Config) -> Path:
    return run_folder(config) / "scores" / Path(config.scores.recogniser).stem


def fr_folder(config: Config) -> Path:
    return run_folder(config) / "fr" / (config.fr.name or f"{config.fr.head}-{config.fr.backbone}")


def training_folder(config: Config) -> Path:
    """Where the weights of stage 0 come to lie, as published weights do, with the state of their training."""
    return Path(config.paths.output) / "training" / (config.training.name or config.preset)


def face_cache(config: Config) -> Path:
    """Where what is computed once of the training faces is kept."""
    return Path(config.paths.output) / "faces" / Path(config.training.faces).name
