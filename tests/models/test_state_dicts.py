"""Files of weights: recognised by what they hold, unwrapped, and refused where they are not plain finite numbers."""
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.published import load_contexts
from models.state_dicts import read_state_dict, read_torch
from tests.runtime.mutations import check_reader
from utils.runtime.errors import UserError

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2), "bn.steps": torch.tensor(7)}


def save_legacy(value, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


SAVES = {"safetensors": lambda state, file: save_file(dict(state), file), "zip": torch.save, "legacy": save_legacy}


def read(file: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(file, "the weights")


def refusal(load, *arguments) -> str:
    with pytest.raises(UserError) as error:
        load(*arguments)
    message = str(error.value)
    assert "\n" not in message and ": " in message and "; " in message
    return message


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_byte_that_was_flipped_in_a_zip_of_torch_is_noticed(tmp_path):
    weights = {"weight": torch.arange(1000.0)}
    torch.save(weights, tmp_path / "w.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    place = data.index(torch.tensor(777.0).numpy().tobytes())
    data[place] ^= 1  # a finite number still
    (tmp_path / "w.pt").write_bytes(data)
    assert torch.load(tmp_path / "w.pt", weights_only=True)["weight"][777] != 777  # by torch itself it is not
    assert "Bad CRC-32 for file" in refusal(read, tmp_path / "w.pt") and "download it again" in refusal(read, tmp_path / "w.pt")


def test_numbers_that_float32_does_not_hold_are_refused(tmp_path):
    torch.save({"w": torch.tensor([1.0, 1e300], dtype=torch.float64)}, tmp_path / "w.pt")
    assert "'w' holds NaN or infinite values" in refusal(read, tmp_path / "w.pt")
    torch.save({"w": torch.tensor([1.0, 1e30], dtype=torch.float64)}, tmp_path / "w.pt")
    assert read(tmp_path / "w.pt")["w"].tolist() == [1.0, 1e30]


# ---- containers and wrappers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt", ".npy", ""])
@pytest.mark.parametrize("save", SAVES)
def test_the_first_bytes_tell_the_container(tmp_path, save, suffix):
    SAVES[save](STATE, tmp_path / f"weights{suffix}")
    assert is_state(read(tmp_path / f"weights{suffix}"))


def prefixed(prefix: str, state=STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrapped", [
    prefixed("_orig_mod."), prefixed("module."), prefixed("model."), prefixed("backbone."), prefixed("module._orig_mod."),
    prefixed("_orig_mod.module.model."), prefixed("model.backbone.module."), {"model": STATE, "epoch": 3},
    {"backbone": prefixed("module.")}, {"state_dict": prefixed("model.")}, {"model": {"state_dict": STATE}},
    {"net_state_dict": OrderedDict(STATE)},
    {"state_dict": STATE, "model": "iresnet", "loss": np.float64(0.5), "best": np.bool_(1)},
    {name.replace("fc.", "fc._orig_mod."): tensor for name, tensor in STATE.items()},
    {name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()},
    {"model": STATE, "rng": np.random.default_rng(0).integers(9, size=5), "history": [np.float32(1)]}])
def test_wrappers_are_taken_off(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "weights.pth")
    found = read(tmp_path / "weights.pth")
    assert is_state(found) and not any(tensor.requires_grad for tensor in found.values())


def test_a_name_that_only_some_carry_stays():
    from models.state_dicts import unwrapped

    names = {"model.diffusion_model.out": 0, "first_stage_model.x": 1}
    assert unwrapped(names) == names
    assert unwrapped({"eps_model.x": 0, "betas": 1}) == {"eps_model.x": 0, "betas": 1}


def test_two_names_that_become_one_are_refused(tmp_path):
    torch.save({"a": torch.ones(1), "module.a": torch.zeros(1)}, tmp_path / "weights.pth")
    assert "two of its parameters have one name" in refusal(read, tmp_path / "weights.pth")


# ---- tensors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tensor, words", [
    (torch.tensor([1, torch.nan]), "'fc.weight' holds NaN or infinite values"),
    (torch.tensor([1, torch.inf], dtype=torch.float16), "'fc.weight' holds NaN or infinite values"),
    (torch.tensor([1, torch.nan], dtype=torch.bfloat16), "'fc.weight' holds NaN or infinite values"),
    (torch.ones(2, dtype=torch.complex64), "'fc.weight' is complex"),
    (torch.ones(1).expand(10**9), "'fc.weight' is expanded"),
    (torch.eye(2).to_sparse(), "plain tensor"), (torch.eye(2).to_sparse_csr(), "plain tensor"),
    (torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.quint8), "plain tensor"),
    (torch.empty(3, device="meta"), "plain tensor"), (torch.zeros(2, dtype=torch.float8_e4m3fn), "plain tensor"),
    (bytearray(3), "holds __builtin__.bytearray, which is no plain tensor"),
    (np.ones(2), "no state dict"), ({"nested": 1}, "no state dict"), ("text", "no state dict")])
@pytest.mark.parametrize("save", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_finite_tensor_is_refused(tmp_path, tensor, words, save):
    try:
        SAVES[save](STATE | {"fc.weight": tensor}, tmp_path / "weights.pth")
    except (NotImplementedError, RuntimeError):
        pytest.skip("torch does not save it so")
    message = refusal(read, tmp_path / "weights.pth")
    assert any(word in message for word in words.split("|")) and str(tmp_path / "weights.pth") in message


def test_nan_in_safetensors_and_nothing_at_all_are_refused(tmp_path):
    save_file({"a": torch.tensor([torch.nan])}, tmp_path / "weights.safetensors")
    assert "'a' holds NaN or infinite values" in refusal(read, tmp_path / "weights.safetensors")
    for save in SAVES.values():
        save({}, tmp_path / "weights")
        assert "holds no tensors" in refusal(read, tmp_path / "weights")


# ---- what is no file of weights --------------------------------------------------------------------------------------

@pytest.mark.parametrize("start, words", [
    (b"", "damaged or incomplete"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    (b"\n<!DOCTYPE html><html>", "is a web page"), (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"), (b"\x1f\x8b\x08", "a gzip file"),
    (b"GGUF\x03", "is a GGUF file"), (struct.pack("<Q", 2**40) + b'{"a"', "damaged or incomplete"),
    (b"hello", "begins with b'hello'"),
    (b"\x80\x02}.", "is not a file of torch.save"), (b"PK\x03\x04" + b"\0" * 60, "BadZipFile")])
def test_other_files_are_called_what_they_are(tmp_path, start, words):
    (tmp_path / "weights.pth").write_bytes(start)
    assert words in refusal(read, tmp_path / "weights.pth")
    assert words in refusal(load_contexts, tmp_path / "weights.pth")


def test_a_broken_header_of_safetensors_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 5) + b'{"a":')
    assert "a: is not a file of weights, or is damaged (SafetensorError" in refusal(read, tmp_path / "a")
    assert "is a .safetensors file, not contexts" in refusal(load_contexts, tmp_path / "a")


def test_numpy_files_and_programs_are_called_what_they_are(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "is a numpy array, not weights" in refusal(read, tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert "is a zip file, but not one of torch.save" in refusal(read, tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    assert "is a TorchScript program, which would run" in refusal(read, tmp_path / "a.pt")


def with_pickle(data: bytes) -> bytes:
    """A file of torch.save with this as its content."""
    buffer, hostile = io.BytesIO(), io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(hostile, "w") as archive:
        for member in whole.infolist():
            archive.writestr(member.filename, data if member.filename.endswith("data.pkl") else whole.read(member))
    return hostile.getvalue()


@pytest.mark.parametrize("pickled, words", [
    (b"\x80\x02cnumpy\nfromfile\n.", "would run 'numpy.fromfile' while being read"),
    (b"\x80\x02cbuiltins\neval\n.", "would run 'builtins.eval' while being read"),
    (b"\x80\x02ctorch.hub\nload\n.", "would run 'torch.hub.load' while being read"),
    (b"\x80\x02ctorch.nn.modules.linear\nLinear\n.", "holds torch.nn.modules.linear.Linear, which is no plain tensor"),
    (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "would run 'posix.system' while being read"),
    (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "holds builtins.bytearray, which is no plain tensor"),
    (b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", "holds torch.Tensor, which is no plain tensor"),
    (b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.", "holds torch.storage.UntypedStorage, which is no"),
    (b"\x80\x02]r\xff\xff\xff\x7f.", "it asks for memory"), (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.", "RecursionError"),
    (b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\nX\x01\x00\x00\x00b\x85R\x87R"
     b"(K\x01K\x04\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
     b"K?tb\x89X\x20\x00\x00\x00" + b"A" * 32 + b"tb.", "not plain numbers")],
    ids=["code", "eval", "hub", "module", "newer code", "bytearray", "tensor", "storage", "memo", "circle", "array"])
def test_hostile_pickles_are_refused(tmp_path, pickled, words):
    (tmp_path / "weights.pth").write_bytes(with_pickle(pickled))
    assert words in refusal(read_torch, tmp_path / "weights.pth")
    assert words in refusal(load_contexts, tmp_path / "weights.pth")


def test_a_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    assert "it would take more memory than its size justifies" in refusal(read, tmp_path / "weights.pth")


# ---- random damage ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", SAVES)
def test_damaged_weights(tmp_path, save):
    SAVES[save](STATE, tmp_path / "weights")
    check_reader(tmp_path / "weights", (tmp_path / "weights").read_bytes(), lambda: read(tmp_path / "weights"))


@pytest.mark.parametrize("content", ["tensors", "arrays"])
def test_damaged_pickles_of_torch(tmp_path, content):
    """With whole zips around them, so that no check of sums comes first."""
    value = STATE if content == "tensors" else {"0": np.ones(3, np.float32), "ann": np.float64(0.5)}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))

    def read() -> None:
        (tmp_path / "weights.pth").write_bytes(with_pickle((tmp_path / "pickled").read_bytes()))
        read_torch(tmp_path / "weights.pth")

    check_reader(tmp_path / "pickled", pickled, read)


@pytest.mark.parametrize("kind", ["npy", "npz", "zip", "legacy", "pickle"])
def test_damaged_contexts(tmp_path, kind):
    file, rows = tmp_path / "contexts", np.eye(3, 4, dtype=np.float32)
    by_id = dict(zip("abc", rows, strict=True))
    buffer = io.BytesIO()
    match kind:
        case "npy":
            np.save(buffer, rows)
        case "npz":
            np.savez(buffer, ids=np.array(list("abc")), contexts=rows)
        case "pickle":
            with pytest.raises(UserError, match="is not a file of torch.save"):
                file.write_bytes(pickle.dumps({"a": 1.0}, 2))
                load_contexts(file)
            return
        case _:
            torch.save(by_id, buffer, _use_new_zipfile_serialization=kind == "zip")
    check_reader(file, buffer.getvalue(), lambda: load_contexts(file))
