"""Files that nobody should have to read, made from nothing or from valid ones: format -> what is wrong -> its content."""
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.faults.stages import bin_of, face, npz, png, torch_bytes

MARK = "out/ran"  # what a file's code would leave
# What is wrong -> a file's bytes, or what makes it.
Inputs = dict[str, bytes | Callable[[Path], object]]


class Runs:
    """Pickled, it runs a program when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {MARK}",)


class ObjectType:
    """Pickled, it is numpy's type of objects with flags of the file's choice, which corrupt memory."""

    def __reduce__(self) -> tuple:
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


def encoded(texts: dict[str, str]) -> Inputs:
    return {kind: text.encode("utf-8", "surrogatepass") for kind, text in texts.items()}


# ---- in the place of any file ----------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n%%EndComments\n%%EOF\n"
MEMO, TERABYTES = b"\x80\2]r\xff\xff\xff\x7f.", b"\x80\4\x8e" + struct.pack("<Q", 2**40) + b"."  # pickles that ask for memory


def sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(2**40)


ANYTHING: Inputs = {
    "empty": b"", "one byte": b"\x80", "random bytes": np.random.default_rng(0).bytes(5000), "zeros": bytes(100_000),
    "a web page": b"<!DOCTYPE html><html>", "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "EPS": EPS, "a pickle with code": pickle.dumps(Runs()), "an old pickle with code": pickle.dumps(Runs(), 0),
    "UTF-16": "name,name\n1,2\n".encode("utf-16"), "another zip": npz(other=np.zeros(3)), "a terabyte of nothing": sparse,
    "a directory": lambda file: file.mkdir(), "a pipe": lambda file: os.mkfifo(file),
    "a dangling link": lambda file: file.symlink_to("nowhere"), "a link loop": lambda file: file.symlink_to(file.name),
    "a device": lambda file: file.symlink_to("/dev/zero")}


# ---- photographs -----------------------------------------------------------------------------------------------------

def png_of(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def images() -> Inputs:
    picture = Image.open(io.BytesIO(face(3, 120)))
    saved = {kind: png(picture, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")}
    text = zlib.compress(bytes(10**8), 1)  # in a comment
    comment = struct.pack(">I", len(text) + 3) + b"zTXta\0\0" + text + struct.pack(">I", zlib.crc32(b"zTXta\0\0" + text))
    lying_bmp = struct.pack("<IHHIIiiHH", 99, 0, 0, 54, 40, 2**30, -(2**30), 1, 24)
    return {
        **{f"half a {kind}": data[: len(data) // 2] for kind, data in saved.items()},
        **{f"the head of a {kind}": data[:30] for kind, data in saved.items()},
        "20,000 x 20,000 of one bit": png_of(20_000, 20_000, zlib.compress(bytes(20_000 * 2501)), 1, 0),
        "two billion wide": png_of(2**31 - 1, 2**31 - 1, b""), "no pixels": png_of(0, 0, b""),
        "too little data": png_of(500, 500, zlib.compress(bytes(100))),
        "a comment that unpacks to 100 MB": png_of(9, 9, zlib.compress(bytes(1)), extra=comment),
        "wrong check sum": saved["PNG"][:29] + bytes(4) + saved["PNG"][33:],
        "GIF of 65,535": b"GIF89a\xff\xff\xff\xff\xf0" + bytes(22),
        "floats": png(Image.new("F", (50, 50)), "TIFF"), "32 bits": png(np.full((50, 50), 2**30, np.int32), "TIFF"),
        "TIFF that points at itself": b"II*\0\x08\0\0\0\1\0" + bytes(12) + b"\x08\0\0\0",
        "BMP that lies": b"BM" + lying_bmp + bytes(60),
        "SVG": b"<svg xmlns='x' width='9'/>", "PPM of terabytes": b"P6 9999999 9999999 255\n", "PSD": b"8BPS\0\1" + bytes(40),
        "ICO": b"\0\0\1\0\1\0" + bytes(30), "XBM": b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {",
        "PDF": b"%PDF-1.4\n", "FITS": b"SIMPLE  =  T", "HEIC": b"\0\0\0\x18ftypheic" + bytes(99),
        "a JPEG's first bytes": b"\xff\xd8\xff\xe0"}


# ---- arrays ----------------------------------------------------------------------------------------------------------

def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def header(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def with_header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + body


def arrays(good: dict[str, np.ndarray], key: str) -> Inputs:
    """An .npz file whose array `key` is not what it should be."""
    def member(content: bytes, **options: int) -> bytes:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", **options) as archive:
            for name, array in good.items():
                archive.writestr(f"{name}.npy", content if name == key else npy(array))
        return data.getvalue()
    values, whole = good[key], npz(**good)
    place = whole.index(b"PK\1\2")
    some_nan = np.where(np.arange(values.size).reshape(values.shape) == 3, np.nan, values)
    changed = {"NaN": some_nan, "infinite": np.full_like(values, np.inf), "0-d": values.ravel()[0], "3-d": values[None],
               "complex": values + 1j, "integers": values.astype(int), "texts": values.astype(str),
               "objects": values.astype(object), "one row": values[:1], "empty": values[:0], "booleans": values > 0}
    headers = {"terabytes": (header("'<f4'", "(1000000000000,)"),), "negative": (header("'<f4'", "(-1, 4)"), bytes(16)),
               "objects by header": (header("'|O'", "(3,)"), pickle.dumps(Runs())), "records": (header("[('a','<f4')]", "(1,)"),),
               "a deep header": ("(" * 5000,), "code in the header": ("__import__('os').system('true')",)}
    bomb = with_header(header("'<f4'", "(50000000,)"), bytes(200_000_000))
    return {**{kind: npz(**good | {key: array}) for kind, array in changed.items()},
            **{kind: member(with_header(*of)) for kind, of in headers.items()},
            "a bomb": member(bomb, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
            "encrypted": whole[: place + 8] + b"\1" + whole[place + 9 :], "cut": whole[:-30], "without its end": whole[:place],
            "lacks it": npz(**{name: array for name, array in good.items() if name != key})}


def contexts() -> Inputs:
    rows, numbers = np.eye(8, 512, dtype=np.float32), np.arange(8).astype(str)
    ids = {"NUL": "a\0b", "300 characters": "x" * 300, "a path": "../x", "absolute": "/x", "empty": "", "blank": "  ",
           "hidden": ".x", "a backslash": "a\\b", "a line": "a\nb", "an escape": "a\x1b[2J", "twice": "1"}
    by_id = {number: torch.from_numpy(row) for number, row in zip(numbers.tolist(), rows, strict=True)}
    return {
        **arrays({"ids": numbers, "contexts": rows}, "contexts"),
        **{f"id: {kind}": npz(ids=np.array([name, *numbers[1:]]), contexts=rows) for kind, name in ids.items()},
        "half a surrogate pair": torch_bytes(by_id | {"a\ud800": by_id["1"]}), "seven ids": npz(ids=numbers[1:], contexts=rows),
        "twice as long": npz(ids=numbers, contexts=2 * rows), "npy of objects": npy(np.array([{}], dtype=object)),
        "npy of NaN": npy(rows * np.nan), "npy, cut": npy(rows)[:-9], "torch: code": torch_bytes({"0": Runs()}),
        "torch: a list": torch_bytes([1, 2]), "torch: cut": torch_bytes(by_id)[:-99], "torch: nothing": torch_bytes({}),
        "torch: shapes differ": torch_bytes(by_id | {"9": torch.zeros(3)}),
        **{f"torch: {kind}": torch_bytes(by_id | {"1": tensor}) for kind, tensor in strange_tensors(by_id["1"]).items()}}


# ---- weights, configurations, benchmarks -----------------------------------------------------------------------------

def strange_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"sparse": tensor.to_sparse(), "complex": tensor + 0j, "NaN": tensor * torch.nan, "meta": tensor.to("meta"),
            "expanded": torch.zeros(()).expand(tensor.shape), "huge": torch.zeros(()).expand(2**40),
            "quantised": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)}


def weights(good: dict[str, torch.Tensor]) -> Inputs:
    name = [name for name, tensor in good.items() if tensor.dim() > 1][-1]
    deep: dict = {}
    for _ in range(200):
        deep = {"model": deep}
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
    whole = torch_bytes(good)

    def safetensors(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode() + bytes(4)

    def one(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0, 4]") -> bytes:
        return safetensors(f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}')
    changed = strange_tensors(good[name]) | {
        "code": Runs(), "misshapen": torch.zeros(2, 3), "integers": good[name].int(), "a text": "x"}
    return {
        **{kind: torch_bytes(good | {name: value}) for kind, value in changed.items()},
        "the old container with code": torch_bytes(good | {name: Runs()}, _use_new_zipfile_serialization=False),
        "one is missing": torch_bytes({key: value for key, value in good.items() if key != name}), "nothing": torch_bytes({}),
        "one too many": torch_bytes(good | {"extra": torch.zeros(1)}), "two of one name": torch_bytes(
            good | {f"module.{name}": good[name]}), "deep": torch_bytes(deep), "a number": torch_bytes(3),
        "a program (TorchScript)": program.getvalue(), "a network": torch_bytes(torch.nn.Linear(1, 1)),
        "cut": whole[: len(whole) // 2], "without its end": whole[:-200], "a memo of gigabytes": MEMO, "terabytes": TERABYTES,
        "safetensors of terabytes": struct.pack("<Q", 2**40) + b"{" + bytes(99), "safetensors: no JSON": safetensors("{not json"),
        "safetensors: outside": one(offsets="[0, 400000000000]"), "safetensors: negative": one(shape="[-1]"),
        "safetensors: unknown type": one("F999"), "safetensors: too small": one(shape="[99999999999]"),
        "safetensors: deep": safetensors("{" + "[" * 50_000), "safetensors of another": one(),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99), "GGUF": b"GGUF" + bytes(99), "gzip": b"\x1f\x8b\x08" + bytes(99)}


def configurations(good: str) -> Inputs:
    changed = {
        "T is true": ("T: 1000", "T: true"), "T is tagged": ("T: 1000", "T: !!int abc"),
        "T is 10^9": ("T: 1000", "T: 1000000000"), "T is 1": ("T: 1000", "T: 1"), "another schedule": ("linear", "cosine"),
        "image of 4": ("image_size: ", "image_size: 4 # "), "image of 2^30": ("image_size: ", "image_size: 1073741824 # "),
        "a variable": ("T: 1000", "T: ${oc.env:HOME}"),
        "channels -32": ("initial_channels: ", "initial_channels: -32 # "), "a circle": ("T: 1000", "T: ${diffusion.T}"),
        "channels 10^9": ("initial_channels: ", "initial_channels: 1000000000 # "),
        "of pixels": ("latent_diffusion: true", "a: 1"),
        "heads of 0": ("attention_head_channels: ", "attention_head_channels: 0 # "), "a tab": ("diffusion:", "\tdiffusion:"),
        "an unknown argument": ("input_channels: $", "unknown: 3\n  input_channels: $")}
    powers = "".join(f"x{k}: {('${x' + str(k - 1) + '}') * 9 if k else 1}\n" for k in range(9))
    aliases = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 1}]\n" for k in range(9))
    return encoded({kind: good.replace(*change) for kind, change in changed.items()} | {
        "model is a list": good.partition("model:")[0] + "model: [1]\n", "model is 3": good.partition("model:")[0] + "model: 3\n",
        "code": f"a: !!python/object/apply:os.system ['touch {MARK}']\n{good}", "aliases that multiply": aliases + good,
        "an alias of itself": f"a: &a [*a]\n{good}", "deep": "a: " + "[" * 5000, "a list": "- 1\n", "two": f"{good}---\na: 1\n",
        "interpolations that multiply": powers + good.replace("T: 1000", "T: ${x8}"), "100,000 nodes": "a:\n" + "- 1\n" * 100_000,
        "a long number": f"a: {'1' * 5000}\n{good}", "half a surrogate pair": f"a: \ud800\n{good}"})


def benchmarks() -> Inputs:
    images, same = pickle.loads(bin_of(range(10)))
    changed = {
        "code": (images, [Runs()]), "objects": (np.array(images[:2], dtype=object), same),
        "a type with flags": (ObjectType(), same),
        "too few": (images[:-1], same), "nothing": ([], []), "a number": 3, "no images": ([b"x"] * 20, same), "three": (1, 2, 3),
        "texts": (["x"] * 20, same), "all alike": (images[:4], same[:2]),
        "another size": ([face(1, 50)] * 20, same),
        "EPS": ([EPS] * 20, same), "labels of 7": (images, [7] * 10), "labels are texts": (images, ["a"] * 10),
        "huge images": ([png_of(60_000, 60_000, b"")] * 20, same)}
    return {**{kind: pickle.dumps(value) for kind, value in changed.items()}, "cut": bin_of(range(10))[:-50],
        "terabytes": TERABYTES,
            "evaluates": b"(lp0\ncbuiltins\neval\n(S'1'\ntRa.",
            "opens": b"cbuiltins\nopen\n(S'" + MARK.encode() + b"'\nS'w'\ntR.",
            "a memo of gigabytes": MEMO, "deep": b"\x80\2" + b"]" * 50_000 + b"a" * 49_999 + b".",
            "holds itself": b"\x80\2]q\0h\0a.",
            "attributes of a class": b"\x80\2cnumpy\nndarray\nN}X\3\0\0\0newX\1\0\0\0xs\x86b."}


# ---- texts -----------------------------------------------------------------------------------------------------------

PAIRS = "10\t1\n" + "p0 0 1\np1 0 p2 0\n" * 10
CSV = "".join(f"{i:06d},{(i + 1) % 8:06d}\n" for i in range(8))
POINTS = "0.png 1 2 3 4 5 6 7 8 9 10 0.9\n"
TEXTS: dict[str, Inputs] = {
    "pairs": encoded({
        "a path": PAIRS.replace("p2", "../p2"), "absolute": PAIRS.replace("p2", "/etc"), "NUL": PAIRS.replace("p2", "p\0"),
        "minus": PAIRS.replace("0 1", "0 -1"), "a huge number": PAIRS.replace("0 1", "0 " + "9" * 5000), "cut": PAIRS[:-9],
        "folds that lie": PAIRS.replace("10", "99999999999"), "no header": PAIRS[5:], "nobody": PAIRS.replace("p2", "nobody"),
        "one long line": "p " * 10**6}),
    "custom CSV": encoded({
        "a long field": f"{'x' * 200_000},1\n{CSV}", "unknown": CSV.replace("000003", "x"), "itself": CSV.replace(
            "000000,000001", "000000,000000"), "twice": CSV + CSV, "one field": f"000000\n{CSV}", "an open quote": f'"{CSV}',
        "NUL": CSV.replace("000003", "00\0"), "lacks one": CSV[14:], "half a surrogate pair": f"{CSV}\ud800,000001\n"}),
    "leave_out": encoded({
        "misspelt": "p11\n", "another case": "P1\n", "half a surrogate pair": "\ud800\n", "NUL": "p1\0\n", "a path": "../p1\n",
        "everybody": "".join(f"p{i}\n" for i in range(8)), "a long line": "x" * 10**6}),
    "keep-list": encoded({"unknown": "p1/77.png\n", "a path": "../p1/0.png\n", "of one": "p1/0.png\n"}),
    "IJB-C face_tid_mid": encoded({
        "cut": "0.png 1\n", "text": "0.png a b\n", "huge": "0.png 99999999999999999999 1\n", "fewer": "0.png 0 0\n",
        "paths": "".join(f"../../../etc/passwd{k} 0 0\n" for k in range(8))}),
    "IJB-C name_5pts_score": encoded({"NaN": POINTS.replace("1 2", "nan 2") * 8, "on a line": POINTS * 8, "cut": "0.png 1\n"}),
    "IJB-C template_pair_label": encoded({
        "unknown": "0 99 1\n0 1 0\n", "label 7": "0 1 7\n", "all alike": "0 1 1\n", "negative": "-1 1 1\n0 1 0\n"})}
# The project's own files, by their suffixes.
OWN: dict[str, Inputs] = {
    ".json": encoded({
        "a list": "[]", "null": "null", "a number": "3", "an object": "{}", "NaN": '{"decides": NaN}', "deep": "[" * 100_000,
        "a huge number": '{"format": ' + "9" * 5000 + "}", "1e999": '{"eer": 1e999}', "cut": '{"format": 2, "dec',
        "decides is a list": '{"format": 2, "decides": [1]}', "decides nothing": '{"format": 2, "decides": {}}'}),
    ".csv": encoded({
        "one column": "identity\np1\n", "a long field": f"identity,image\n{'x' * 200_000},1\n", "NUL": "identity,image\n\0,1\n",
        "no rows": "identity,image\n", "a path": "identity,image\n../../in/faces/p1,0.png\n",
        "no such": "identity,image\nq,0.png\n", "sources of others": "identity,image,sha256\nq,0.png,00\n",
        "reasons": "identity,image,reason\np1,0.png,x\n"}),
    ".npy": {"objects": npy(np.array([{}], dtype=object)), "another shape": npy(np.zeros((2, 3), np.uint8)),
             "texts": npy(np.array(["a"])), "terabytes": with_header(header("'|u1'", "(9000000000000,)"), bytes(9))}}


def damaged(whole: bytes, chance) -> bytes:
    """The file with up to four flips, cuts, insertions, repetitions, or numbers that lie; `chance` is a random.Random."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        place, more = chance.randrange(len(data) + 1), chance.randint(1, 40)
        match chance.choice(["flip", "cut", "remove", "insert", "repeat", "lie"]):
            case "flip" if place < len(data):
                data[place] ^= chance.randint(1, 255)
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + more]
            case "insert":
                data[place:place] = chance.randbytes(more)
            case "repeat":
                data[place:place] = data[place : place + 40] * (more % 5)
            case "lie":
                data[place : place + 4] = chance.choice([b"\xff" * 8, bytes(8), b"9" * 12, b"-1", b"nan", b"${a}", b"("])
    return bytes(data)
