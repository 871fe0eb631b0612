"""State dicts and arrays from files that anyone may have made: reading one never runs code from it."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.runtime.errors import UserError
from utils.runtime.files import require_file

DOWNLOAD = "download it again from its authors"


class Unread:
    """Stands in for a class that a checkpoint names beside its weights."""


# What torch's restricted unpickler may use besides tensors and containers. None of these runs anything given to it.
ARRAY_CONSTRUCTOR = np.empty(0).__reduce__()[0]
ALLOWED = [
    (ARRAY_CONSTRUCTOR, "numpy.core.multiarray._reconstruct"),  # as numpy 1 calls it
    (ARRAY_CONSTRUCTOR, "numpy._core.multiarray._reconstruct"),  # as numpy 2 calls it
    np.ndarray, np.dtype, np.dtypes.Float16DType, np.dtypes.Float32DType, np.dtypes.Float64DType,
    (Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),  # in every LDM model.ckpt
]


def read_state_dict(file: Path | str, setting: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of anything torch.save wrote, on the CPU, by name.

    A state dict inside a checkpoint (`state_dict`, `net_state_dict`) is found, and the prefix `module.` dropped.

    Args:
        setting: what the file is to the user, for the error.
    Raises:
        UserError: the file is missing, damaged, would run code, or holds no state dict.
    """
    file = require_file(file, setting, DOWNLOAD + ", or correct the setting")
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except SafetensorError as error:
            raise damaged(file, error) from None
    else:
        state = read_torch(file)
    for key in ("state_dict", "net_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file}: holds no state dict (names and tensors); choose the file that holds the weights")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def read_torch(file: Path) -> Any:
    """What torch.save wrote: tensors, numpy arrays, numbers, strings and containers of them, on the CPU.

    Raises:
        UserError: the file is damaged, or would run code.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{file}: would run '{refused[1]}' while being read, so it was not read; do not use it, "
                            "take a file of nothing but weights from the authors") from None
        raise damaged(file, error) from None


def damaged(file: Path, error: Exception) -> UserError:
    first_line = str(error).strip().partition("\n")[0][:100]
    return UserError(f"{file}: is damaged or incomplete ({type(error).__name__}: {first_line}); {DOWNLOAD}")


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first way in which names and shapes `found` are not those `expected`, in words; None where they are."""
    for name in [*expected, *found]:
        if name not in found:
            return f"'{name}' is missing"
        if name not in expected:
            return f"'{name}' is superfluous"
        if found[name].shape != expected[name].shape:
            return f"'{name}' is of shape {list(found[name].shape)}, not {list(expected[name].shape)}"
    return None
