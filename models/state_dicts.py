"""State dicts and arrays from files that anyone may have made: reading one never runs code from it."""
import io
import mmap
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from utils.runtime import foreign_arrays
from utils.runtime.errors import UserError
from utils.runtime.files import require_file

DOWNLOAD = "download it again from its authors"
RESAVE = "take a file of nothing but weights from the authors"

# Containers by their first bytes: those that are read, and others that people mistake for them.
STARTS = {b"PK\x03\x04": "zip", b"\x80": "pickle", b"\x93NUMPY": "npy"}
OTHERS = {b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it by git lfs pull",
          b"<": "a web page", b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip file", b"GGUF": "a GGUF file",
          b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture"}

MOST_BYTES = 2**50  # of a file of weights
NESTED = ("state_dict", "net_state_dict", "model", "backbone")  # where checkpoints keep the weights
WRAPPERS = ("model.", "backbone.")  # before every name, where a trainer wrapped the network
WRAPPED = {"_orig_mod", "module"}  # anywhere in a name, by torch.compile and DistributedDataParallel


class Unread:
    """Stands in for a class that a checkpoint names beside its weights."""


# What torch's restricted unpickler may use besides tensors and containers. None of these runs anything given to it.
STAND_INS = foreign_arrays.GLOBALS | {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Unread}  # in every LDM model.ckpt
# Of what torch allows by itself, some takes memory, or makes tensors that are none of ours.
PLAIN = re.compile(r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|device|bool)|"
                   r"torch\.(cuda\.)?\w+Storage|torch\.[a-z]+[0-9]\w*")
HARMLESS = re.compile(r"(builtins|__builtin__)\.(set|frozenset|bytearray|complex)|collections\.(Counter|defaultdict)|"
                      r"torch\._(utils|tensor)\.(?!_rebuild_(tensor|tensor_v2|parameter)$).*|torch\.(\w+\.)?\w*Tensor|"
                      r"torch\.(storage|serialization)\.\w+|torch\.nn\..*")


def read_state_dict(file: Path | str, setting: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of anything torch.save wrote, on the CPU, by name, whatever the file's suffix.

    A state dict inside a checkpoint (NESTED) is found, and what wrappers put before the names is taken off.

    Args:
        setting: what the file is to the user, for the error.
    Raises:
        UserError: the file is missing, damaged, would run code, or holds no state dict of dense and finite numbers.
    """
    file = require_file(file, setting, "get it from its authors, or correct the setting")
    with foreign_arrays.reading(file, "a file of weights", DOWNLOAD):
        kind = container(file)
        if kind == "npy":
            raise UserError(f"{file}: is a numpy array, not weights (.safetensors, or by torch.save); choose the weights' file")
        state = load_file(file) if kind == "safetensors" else read_torch(file)
        state = unwrapped(state)
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise UserError(f"{file}: holds no state dict (names and tensors); choose the file that holds the weights")
        for name, tensor in state.items():
            if fault := tensor_fault(tensor):
                raise UserError(f"{file}: '{name[:200]}' {fault}; {DOWNLOAD}, or save its weights as dense floats on the CPU")
        if not state:
            raise UserError(f"{file}: holds no tensors; choose the file that holds the weights")
        return {name: tensor.detach() for name, tensor in state.items()}


def container(file: Path) -> str:
    """`safetensors`, `zip`, `pickle` or `npy`, by the first bytes of a regular file. Raises UserError where it is none."""
    size = foreign_arrays.require_regular(file, MOST_BYTES)
    with open(file, "rb") as stream:
        start = stream.read(64)
    for first, kind in STARTS.items():
        if start.startswith(first) and not (start[8:9] == b"{" and start[:1] == b"\x80"):
            return kind
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    found = next((what for first, what in OTHERS.items() if start.lstrip().startswith(first)), None)
    if found:
        raise UserError(f"{file}: is {found}; {DOWNLOAD}")
    raise UserError(f"{file}: is damaged or incomplete, or neither a .safetensors file nor by torch.save or numpy "
                    f"(it begins with {start[:8]!r}); {DOWNLOAD}")


def read_torch(file: Path) -> Any:
    """What torch.save wrote: tensors, numpy arrays, numbers, strings and containers of them, on the CPU.

    Raises:
        UserError: the file is damaged, would run code, or holds other than plain tensors.
    """
    with foreign_arrays.reading(file, "a file of torch.save", DOWNLOAD), warnings.catch_warnings(action="ignore"):
        names, pickled = scan_torch(file)
        for name in sorted(names - STAND_INS.keys()):
            if HARMLESS.fullmatch(name):
                raise UserError(f"{file}: holds {name}, which is no plain tensor; save the network's state_dict() as dense "
                                "floats on the CPU")
            if not PLAIN.fullmatch(name):
                raise UserError(f"{file}: would run '{name}' while being read, so it was not read; do not use it, {RESAVE}")
        with (torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]),
              open(file, "rb") as stream):  # given its name, torch goes by the suffix
            return foreign_arrays.resolved(torch.load(stream, map_location="cpu", weights_only=True), pickled)


def scan_torch(file: Path) -> tuple[set[str], int]:
    """What the pickles of a file of torch.save name, and their bytes. Raises ValueError and much else where it is damaged."""
    size = foreign_arrays.require_regular(file, MOST_BYTES)
    if container(file) == "zip":
        with zipfile.ZipFile(file) as archive:
            foreign_arrays.check_zip(archive, size)
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(f"{file}: is a TorchScript program, which would run, so it was not read; {RESAVE}")
            foreign_arrays.check_sums(archive, archive.namelist())  # torch checks none
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{file}: is a zip file, but not one of torch.save; choose the file that holds the weights")
        return foreign_arrays.scan(io.BytesIO(pickles[0]), len(pickles[0])), len(pickles[0])
    names = set()
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for number in range(5):  # the legacy container: magic number, version, system, content, keys of the storages
            names |= foreign_arrays.scan(view, size)
            if number == 0 and names:  # no magic number: a plain pickle, which torch refuses
                break
    return names, size


def unwrapped(state: Any) -> Any:
    """The state dict inside a checkpoint, with its parameters' own names."""
    while isinstance(state, Mapping):
        nested = next((state[key] for key in NESTED if isinstance(state.get(key), Mapping)), None)
        if nested is None:
            break
        state = nested
    if not isinstance(state, Mapping):
        return state
    names = [".".join(part for part in str(name).split(".") if part not in WRAPPED) for name in state]
    while names and (prefix := next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in names)), "")):
        names = [name.removeprefix(prefix) for name in names]
    if len(set(names)) < len(names):
        raise ValueError("two of its parameters have one name")
    return dict(zip(names, state.values(), strict=True))


def tensor_fault(tensor: Tensor) -> str | None:
    """Why a tensor is not an array of dense, finite numbers, in words; None where it is."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return "is sparse, quantised, nested or without values"
    if tensor.is_complex():
        return "is complex"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return "is expanded: larger than its own data"
    if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize in (1, 8) else tensor).isfinite().all():
        return "holds NaN or infinite values"  # in float32, in which networks compute: of 64 bits, too large ones
    return None


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first way in which names, shapes and types `found` are not those `expected`, in words; None where they are."""
    for name in [*expected, *found]:
        if name not in found:
            return f"'{name}' is missing"
        if name not in expected:
            return f"'{name}' is superfluous"
        if found[name].shape != expected[name].shape:
            return f"'{name}' is of shape {list(found[name].shape)}, not {list(expected[name].shape)}"
        if expected[name].is_floating_point() and not found[name].is_floating_point():
            return f"'{name}' is of {found[name].dtype}, not floats"
    return None
