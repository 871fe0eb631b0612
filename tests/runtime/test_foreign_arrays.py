"""Strangers' files: named members of each kind, and random damage to small files of every format of this floor."""
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from tests.runtime.mutations import check_reader, read_or_refused
from utils.runtime import foreign_arrays
from utils.runtime.errors import UserError
from utils.runtime.files import read_json, read_names, read_npz, write_json, write_npz

ARRAYS = {"ids": np.array(["ann", "Zoë"]), "contexts": np.arange(6, dtype=np.float32).reshape(2, 3),
          "big": np.arange(3, dtype=">i4"), "yes": np.array([True, False]), "none": np.zeros((0, 4))}


def refused(read, *arguments) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments)
    message = str(error.value)
    assert "\n" not in message and ": " in message and "; " in message
    return message


def npz(members: dict[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


# ---- .npz ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_they_were(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    for name, array in read_npz(tmp_path / "a.npz", list(ARRAYS)).items():
        assert np.array_equal(array, ARRAYS[name]) and array.dtype == ARRAYS[name].dtype.newbyteorder("=")


TERABYTES = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"


@pytest.mark.parametrize("member, words", [
    (header(TERABYTES), "an array of float32 (1000000000000,) has 0 bytes|has the shape"),
    (header(TERABYTES.replace("(1000000000000,)", "(3,)"), b"\0" * 11), "an array of float32 (3,) has 11 bytes"),
    (header(TERABYTES.replace("(1000000000000,)", "(10**12,)")), "malformed"),
    (header(TERABYTES.replace("(1000000000000,)", "(1000000000000, 0)")), "has the shape (1000000000000, 0)"),
    (header(TERABYTES.replace("(1000000000000,)", "(-1, -1)"), b"\0" * 4), "has the shape (-1, -1)"),
    (header(TERABYTES.replace("'<f4'", "'<U0'")), "not plain numbers"),
    (header(TERABYTES.replace("'<f4'", "'|O'")), "of type object, not plain numbers"),
    (header(TERABYTES.replace("'<f4'", "[('a', '<f4')]")), "not plain numbers"),
    (header("-" * 60_000 + "1"), "Header info length"), (header("-" * 900 + "1"), "ValueError|RecursionError"),
    (npy(np.array([{}], dtype=object)), "of type object, not plain numbers"),
    (npy(np.array([1j])), "of type complex128, not plain numbers"),
    (npy(np.array(["a"])).replace(b"a\0\0\0", b"\xff\xff\xff\x7f"), "a text holds what is no character"),
    (npy(np.array([True])).replace(b"\x01", b"\x07")[:6] + npy(np.array([True]))[6:-1] + b"\x07", "neither 0 nor 1"),
    (b"", "EOF|magic"), (b"\x93NUMPY\x07\x00", "version"),
])
def test_a_member_that_lies_is_refused(tmp_path, member, words):
    (tmp_path / "a.npz").write_bytes(npz({"a.npy": member}))
    message = refused(read_npz, tmp_path / "a.npz", ["a"])
    assert any(word in message for word in words.split("|")) and "a.npz: is not a readable .npz file" in message


def test_bombs_encrypted_and_doubled_members_are_refused(tmp_path):
    file, zeros = tmp_path / "a.npz", npy(np.zeros(10**8, np.uint8))
    file.write_bytes(npz({"a.npy": zeros}, compression=zipfile.ZIP_DEFLATED))
    assert file.stat().st_size < 200_000
    assert "more memory than its size justifies" in refused(read_npz, file, ["a"])
    file.write_bytes(npz({"a.npy": zeros[:10**6]}, compression=zipfile.ZIP_LZMA))
    assert "in an unusual way" in refused(read_npz, file, ["a"])
    whole = npz({"a.npy": npy(np.zeros(3))})
    central = whole.index(b"PK\x01\x02")
    file.write_bytes(whole[: central + 8] + bytes([whole[central + 8] | 1]) + whole[central + 9 :])
    assert "it is encrypted" in refused(read_npz, file, ["a"])
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as archive:
        for value in (0, 1):
            archive.writestr("a.npy", npy(np.array(value)))
    assert "two of its members have one name" in refused(read_npz, file, ["a"])


def test_a_missing_array_and_what_is_no_file_are_named(tmp_path):
    write_npz(tmp_path / "a.npz", a=np.zeros(1))
    assert "a.npz: holds no array 'b'; " in refused(read_npz, tmp_path / "a.npz", ["b"])
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda file: read_npz(file, ["a"]), read_json, lambda file: read_names(file, "fr.leave_out", [])):
        assert "pipe: is a folder, pipe or device" in refused(read, tmp_path / "pipe") or "no such file" in refused(
            read, tmp_path / "pipe")


# ---- pickles ---------------------------------------------------------------------------------------------------------

def unpickle(data: bytes):
    foreign_arrays.scan(io.BytesIO(data), len(data))
    return foreign_arrays.resolved(foreign_arrays.Unpickler(io.BytesIO(data), encoding="bytes").load(), len(data))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    np.arange(3, dtype=">i4"), np.float64(0.5), np.bool_(True), np.float16(2), np.str_("Zoë"), np.zeros((0, 3)),
    np.array(["a", "bc"])])
def test_numpys_arrays_and_numbers_are_read(protocol, value):
    [again] = unpickle(pickle.dumps([value], protocol))
    assert np.array_equal(again, value) and np.shape(again) == np.shape(value)
    assert isinstance(again, np.generic) == isinstance(value, np.generic)


def test_what_is_inside_containers_and_keys_is_read():
    value = {np.int64(3): [np.float32(1)], "a": (np.zeros(2), {"b": np.ones(1)})}
    again = unpickle(pickle.dumps(value))
    assert again[3] == [1] and again["a"][1]["b"] == 1 and list(again)[0] == 3


LONG_MEMO = b"\x80\x02]r\xff\xff\xff\x7f."  # a memo of 17 GB
HUGE_BYTES = b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."
DOUBLING = b"\x80\x02]q\x00" + b"".join(b"]q" + bytes([k]) + b"(h" + bytes([k - 1]) + b"h" + bytes([k - 1]) + b"e"
                                          for k in range(1, 60)) + b"."
ATTRIBUTES = b"\x80\x02cnumpy\nndarray\nN}X\x03\x00\x00\x00newX\x01\x00\x00\x00xs\x86b."  # set on the class itself
TIMES = b"\x80\x02]q\x00c_codecs\nencode\nq\x01" + b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x02\x85q\x03R" + (
    b"h\x01h\x03R" * 10_000) + b"."
CIRCLE = b"\x80\x02]q\x00h\x00a."
DEEP = b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."


@pytest.mark.parametrize("data", [LONG_MEMO, HUGE_BYTES, ATTRIBUTES, TIMES, CIRCLE, DEEP, b"\x80\x02(", b"cos\nsystem\n."],
                         ids=["memo", "bytes", "attributes", "times", "circle", "deep", "cut", "code"])
def test_a_pickle_that_would_take_memory_or_change_something_is_refused(data):
    def read():
        with foreign_arrays.reading("a.bin", "a pickle", "take another"):
            unpickle(data)

    refused(lambda: read_or_refused_raises(read))
    assert not hasattr(foreign_arrays.NdarrayType, "new")


def read_or_refused_raises(read) -> None:
    read_or_refused(read)
    read()


def test_what_doubles_is_walked_once():
    value = unpickle(DOUBLING)
    assert value[0] is value[1]


def test_many_arrays_of_the_same_bytes_are_refused():
    assert len(unpickle(pickle.dumps([np.zeros(10_000)] * 50, 2))) == 50
    shared = pickle.dumps([Again(k) for k in range(200)], 5)
    assert len(shared) < 100_000
    with pytest.raises(ValueError, match="larger than the file"):
        unpickle(shared)


class Again:
    """Another array each time, of the same bytes."""

    data = bytes(80_000)

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self):
        return np.zeros(1).__reduce_ex__(5)[0], (self.data, np.dtype(np.float64), (10_000,), "C")


# ---- JSON ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"a":' * 50_000, "[NaN]", "[-Infinity]", "[1e999]", "[" + "1" * 5000 + "]", '{"a"', "", "nul",
    '{"a": 1}'.encode("utf-16"), b"\x00"], ids=str)
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "a.json: is not valid JSON, or is damaged (" in refused(read_json, tmp_path / "a.json")


def test_json_comes_back_as_it_was(tmp_path):
    value = {"a": [1, 2.5, None, True], os.fsdecode(b"n\xe9"): "Zoë"}  # a folder's name that is not UTF-8
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").write_text("[1]", encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == [1]


# ---- random damage ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    check_reader(tmp_path / "a.npz", (tmp_path / "a.npz").read_bytes(), lambda: read_npz(tmp_path / "a.npz", list(ARRAYS)))


def test_damaged_members_of_npz(tmp_path):
    """With whole zips around them, so that no check of sums comes first."""
    def read():
        data = (tmp_path / "a.npy").read_bytes()
        (tmp_path / "a.npz").write_bytes(npz({"a.npy": data}))
        read_npz(tmp_path / "a.npz", ["a"])

    for array in (ARRAYS["contexts"], ARRAYS["ids"]):
        check_reader(tmp_path / "a.npy", npy(array), read)


def test_damaged_json(tmp_path):
    value = {"format": 2, "decides": {"a.b": 0.5, "c": [1, "x", None]}, "x": -1.5e-7}
    check_reader(tmp_path / "a.json", json.dumps(value).encode(), lambda: read_json(tmp_path / "a.json"))


def test_damaged_lists(tmp_path):
    known, file = ["ann", "Zoë"], tmp_path / "a.txt"
    check_reader(file, "ann\nZoë\n".encode(), lambda: read_names(file, "fr.leave_out", known))


def test_a_byte_that_was_flipped_in_an_npz_is_noticed(tmp_path):
    write_npz(tmp_path / "a.npz", contexts=np.arange(600, dtype=np.float32))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(np.float32(555).tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    assert "Bad CRC-32" in refused(read_npz, tmp_path / "a.npz", ["contexts"])


def test_a_name_that_two_folders_spell_in_two_forms_means_both(tmp_path):
    (tmp_path / "names.txt").write_text("Zo\u00eb\n")
    both = ["Zo\u00eb", "Zoe\u0308"]
    assert read_names(tmp_path / "names.txt", "fr.leave_out", [*both, "ann"]) == set(both)
