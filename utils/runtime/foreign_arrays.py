"""What strangers' files say, taken for numbers only: bytes, texts, and numpy arrays built from checked type, shape and bytes.

Numpy's own constructors take a state as it comes; one that names the type object, with flags of its choice, corrupts the
memory. So nothing of numpy is called while a pickle is read: stand-ins keep what it says, and `resolved` checks it.
"""
import errno
import math
import pickle
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.runtime.errors import UserError, is_out_of_memory

MOST_BYTES = 8 * 1024**3  # of a file, and of what a zip holds
MOST_TEXT = 64 * 1024**2  # of a list or a table
MOST_RATIO, SMALL = 100, 64 * 1024**2  # of a zip's compression, where a member is not small: numbers hardly compress
MOST_HEADER = 1000  # of a .npy file, bytes; numpy parses it as Python
MOST_OPCODES = 5_000_000  # of a pickle
KINDS = "bifuU"  # booleans, integers, floats and texts; no objects or records
MOST_DIMENSIONS = 8


# ---- files -----------------------------------------------------------------------------------------------------------

@contextmanager
def reading(file: Path | str, what: str, fix: str) -> Iterator[None]:
    """Whatever goes wrong inside with a stranger's file becomes one line that names it, and `what` it is not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        of_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # torch's, for a file that was cut
        if of_system or is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file}: is not {what}, or is damaged ({reason}); {fix}") from None


def require_regular(file: Path | str, most: int = MOST_BYTES) -> int:
    """The size of a regular file, which opening neither blocks nor outlasts. Raises UserError where it is none."""
    status = Path(file).stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: is a folder, pipe or device; give a file")
    if status.st_size > most:
        raise UserError(f"{file}: has {status.st_size:,} bytes, of which at most {most:,} are read; give the right file")
    return status.st_size


def read_text(file: Path | str, what: str) -> str:
    """A text in UTF-8, with or without a byte order mark. Raises UserError where it is in another encoding."""
    require_regular(file, MOST_TEXT)
    try:
        return Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); save the {what} as UTF-8") from None


def check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError where a zip of `size` bytes is encrypted, lies, or would take memory that it does not justify."""
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two of its members have one name")
    if any(member.flag_bits & 1 for member in members):
        raise ValueError("it is encrypted")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("it is compressed in an unusual way")
    if (any(member.file_size > max(SMALL, MOST_RATIO * member.compress_size) for member in members)
            or sum(member.compress_size for member in members) > size
            or sum(member.file_size for member in members) > MOST_BYTES):
        raise ValueError("it would take more memory than its size justifies")


def check_sums(archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Raises BadZipFile where the bytes of a member are not those whose checksum the zip holds: one has changed since."""
    for name in names:
        with archive.open(name) as member:
            while member.read(2**20):
                pass


# ---- .npy and .npz ---------------------------------------------------------------------------------------------------

def read_npy(stream: BinaryIO, size: int) -> np.ndarray:
    """The array of a .npy file or member of `size` bytes. Raises ValueError before any memory is taken for a lying header."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is of version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream, max_header_size=MOST_HEADER)
    check_form(dtype, shape, size - stream.tell())
    stream.seek(0)
    return checked_values(np.lib.format.read_array(stream, allow_pickle=False, max_header_size=MOST_HEADER))


def read_npz(file: Path | str, keys: Any) -> dict[str, np.ndarray]:
    """Those of the arrays `keys` that a .npz file holds. Raises ValueError and much else where it is damaged."""
    size, arrays = require_regular(file), {}
    with zipfile.ZipFile(file) as archive:
        check_zip(archive, size)
        for key in keys:
            if f"{key}.npy" in archive.namelist():
                check_sums(archive, [f"{key}.npy"])  # beforehand: newer zipfiles check nothing after a seek
                with archive.open(f"{key}.npy") as member:
                    arrays[key] = read_npy(member, archive.getinfo(f"{key}.npy").file_size)
    return arrays


def check_form(dtype: np.dtype, shape: Any, size: int) -> None:
    """Raises ValueError where an array of this type and shape is no plain one, or does not have `size` bytes."""
    if dtype.kind not in KINDS or dtype.hasobject or dtype.subdtype or not dtype.itemsize:
        raise ValueError(f"an array is of type {dtype}, not plain numbers")
    if not (isinstance(shape, tuple) and len(shape) <= MOST_DIMENSIONS
            and all(type(length) is int and 0 <= length <= max(size, 2**16) for length in shape)):
        raise ValueError(f"an array has the shape {shape!r}"[:200])
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of {dtype} {shape} has {size} bytes")


def checked_values(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order. Raises ValueError where bytes are no booleans, or no characters."""
    if array.dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise ValueError("a boolean is neither 0 nor 1")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "U" and array.size and np.ascontiguousarray(array).reshape(-1).view(np.uint32).max() > 0x10FFFF:
        raise ValueError("a text holds what is no character")
    return array


# ---- pickles ---------------------------------------------------------------------------------------------------------

class StandIn:
    """What a pickle may name. The method keeps a pickle from setting attributes of the class itself."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets the state of what has none")


class Dtype(StandIn):
    """Stands in for numpy.dtype; `state` is what a pickle sets on it, of which only the byte order counts."""

    def __init__(self, name: Any, *ignored: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 2 else None
        order = order.decode("ascii") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("an array is of a type that is not plain numbers")
        self.order = order

    def checked(self) -> np.dtype:
        name = self.name.decode("ascii") if isinstance(self.name, bytes) else self.name
        if not (isinstance(name, str) and re.fullmatch(r"[bifu]\d{1,2}|U\d{1,5}", name)):
            raise ValueError("an array is of a type that is not plain numbers")
        return np.dtype(name).newbyteorder(self.order)


class Array(StandIn):
    """Stands in for what numpy's _reconstruct makes: an array without content, until its state is set."""

    def __init__(self, *ignored: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def checked(self) -> Any:
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise ValueError("an array has no content")
        _, shape, dtype, fortran, data = self.state
        return build(data, dtype, shape, "F" if fortran else "C")


class Scalar(Array):
    """Stands in for numpy's scalar(dtype, bytes)."""

    def __init__(self, dtype: Any = None, data: Any = b"") -> None:
        self.dtype, self.data = dtype, data

    def checked(self) -> Any:
        return build(self.data, self.dtype, (), "C")[()]


class FromBuffer(Array):
    """Stands in for numpy's _frombuffer(buffer, dtype, shape, order), which protocol 5 names."""

    def __init__(self, data: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C", axes: Any = None) -> None:
        self.arguments, self.axes = (data, dtype, shape, "C" if order == "K" else order), axes

    def checked(self) -> Any:
        array = build(*self.arguments)
        return array if self.axes is None else array.transpose(self.axes)


class NdarrayType(StandIn):
    """Stands in for the class numpy.ndarray, which pickles hand to _reconstruct."""


class Latin1(StandIn):
    """How old protocols spell bytes, `_codecs.encode(text, 'latin1')`, without other codecs."""

    def __new__(cls, text: str, encoding: str = "latin1") -> bytes:
        return text.encode("latin1")


class NoBytes(StandIn):
    """How old protocols spell empty bytes, `bytes()`; with a number it would take memory."""

    def __new__(cls) -> bytes:
        return b""


# What a pickle may name, numpy 1's and numpy 2's spelling alike.
GLOBALS: dict[str, Callable] = {
    "_codecs.encode": Latin1, "builtins.bytes": NoBytes, "__builtin__.bytes": NoBytes,
    "numpy.ndarray": NdarrayType, "numpy.dtype": Dtype,
    **{f"numpy.{core}.{name}": stand_in for core in ("core", "_core") for name, stand_in in (
        ("multiarray._reconstruct", Array), ("multiarray.scalar", Scalar), ("numeric._frombuffer", FromBuffer))},
}


class Unpickler(pickle.Unpickler):
    """Resolves only what arrays are made of, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Callable:
        if f"{module}.{name}" not in GLOBALS:
            raise CodeError(f"{module}.{name}")
        return GLOBALS[f"{module}.{name}"]


class CodeError(ValueError):
    """A pickle names something that could run code; the message is its name."""


def scan(stream: BinaryIO, size: int) -> set[str]:
    """What one pickle of at most `size` bytes names, which is not obeyed; the stream is left behind it.

    The stream is in memory: a file's would take what a length asks for before it reads. Newer pickles can spell a name so
    that this reads another: only what resolves the names can refuse them.

    Raises:
        ValueError: it is cut, or would take memory that its length does not justify.
    """
    names, texts, memo, calls, longest = set(), ["", ""], 0, 0, 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MOST_OPCODES:
            raise ValueError(f"it has more than {MOST_OPCODES:,} steps")
        if opcode.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts))
        elif "PUT" in opcode.name:
            if argument > memo + 1:  # the memo is a list as long as the highest index
                raise ValueError("it asks for memory")
            memo += 1
        memo += opcode.name == "MEMOIZE"
        calls += opcode.name == "REDUCE"
        if isinstance(argument, str):
            texts = [texts[1], argument[:100]]
        if isinstance(argument, str | bytes | bytearray):
            longest = max(longest, len(argument))
    if calls * longest > 64 * max(size, 2**20):  # each call may copy the longest text
        raise ValueError("it asks for memory")
    return names


def build(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """An array of numbers that owns its memory. Raises ValueError where the parts do not make one."""
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise ValueError("an array is not made of plain bytes and a plain type")
    numbers = dtype.checked()
    check_form(numbers, shape, len(data))
    return checked_values(np.frombuffer(data, numbers).reshape(shape, order=order).copy(order="K"))


def resolved(value: Any, size: int) -> Any:
    """The value with every stand-in of an array replaced by its array; containers are walked.

    Args:
        size: of the pickle, bytes: the arrays together cannot be larger.
    Raises:
        ValueError: an array is not made of numbers, or they are larger; RecursionError: it is too deep, or holds itself.
    """
    made: dict[int, Any] = {}  # what occurs twice is made once
    left = size

    def walk(value: Any) -> Any:
        nonlocal left
        if not isinstance(value, Array | dict | list | tuple):
            return value
        if id(value) in made:
            return made[id(value)]
        if isinstance(value, Array):
            result = value.checked()
            left -= result.nbytes
            if left < 0:
                raise ValueError("its arrays are larger than the file")
        elif isinstance(value, dict):
            result = {walk(key): walk(item) for key, item in value.items()}
            if len(result) < len(value):
                raise ValueError("two of its keys are equal")
        else:
            result = [walk(item) for item in value]
            result = tuple(result) if isinstance(value, tuple) else result
        made[id(value)] = result
        return result

    return walk(value)
