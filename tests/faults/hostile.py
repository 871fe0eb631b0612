"""Files that nobody should have to read: by hand, and valid ones with random damage, each in the place of a valid one.

READERS says which command reads a file of each format. Allowed is one line that names the file or a setting with exit code 2, or
the right result: that of a cache which is made again, or an image in the list of failures.
"""
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.faults.judging import Result, compared, flaws, show, trial_folder
from tests.faults.processes import ENVIRONMENT, Ended
from tests.faults.stages import STAGES, bin_of, face, npz, png, torch_bytes, write
from utils.runtime.errors import ROOT

MARK = "out/ran"  # what a file's code would leave


@dataclass(frozen=True)
class Reader:
    """What reads a file of a format: where it lies, a stage and its settings. `own`: its loss and damage may be made good."""

    file: str
    stage: str
    settings: tuple[str, ...] = ()
    own: bool = False


def own(stage: str, *files: str, settings: tuple[str, ...] = ()) -> dict[str, Reader]:
    return {file: Reader(f"out/{file}", stage, settings, own=True) for file in files}


EXTRACT = ("contexts.source=extracted", "contexts.faces=in/h", "contexts.name=h")
V = ("training.name=v",)
READERS = {
    "photograph, extracted": Reader("in/h/p/x.png", "contexts", EXTRACT),
    "photograph, aligned": Reader("in/h/p/x.png", "align", ("align.images=in/h", "paths.run=h")),
    "contexts": Reader("in/published.npz", "contexts", ("contexts.source=published", "contexts.file=in/published.npz",
                                                        "contexts.name=h")),
    "statistics": Reader("in/statistics.npz", "contexts", ("contexts.source=gaussian", "contexts.statistics=in/statistics.npz",
                                                           "contexts.name=h")),
    "diffusion model": Reader("in/weights/checkpoints/ema_averaged_model.ckpt", "sample", ("paths.run=h",)),
    "configuration": Reader("in/weights/.hydra/config.yaml", "sample", ("paths.run=h",)),
    "first stage": Reader("in/weights/first_stage_decoder_state_dict.pt", "sample", ("paths.run=h",)),
    "recogniser": Reader("in/recogniser.pth", "verify"),
    ".bin": Reader("in/bins/lfw.bin", "verify"),
    "pairs": Reader("in/pairs.txt", "verify", ("verify.bins=", "verify.ijbc=", "verify.lfw_pairs=in/pairs.txt",
                                               "verify.lfw_faces=out/run/aligned")),
    **{f"IJB-C {name}": Reader(f"in/ijbc/meta/ijbc_{name}.txt", "verify", ("verify.bins=",))
       for name in ("face_tid_mid", "name_5pts_score", "template_pair_label")},
    "leave_out": Reader("in/left.txt", "train_fr", ("fr.leave_out=in/left.txt", "fr.name=v")),
    "keep-list": Reader("in/keep.txt", "train_fr", ("fr.keep_list=in/keep.txt", "fr.name=v")),
    "custom CSV": Reader("in/h.csv", "negatives", ("negatives.custom_file=in/h.csv",)),
    **own("negatives", "contexts/c.npz", "contexts/c.json"),
    **own("sample", "contexts/c.negatives-custom-n.npz", "contexts/c.negatives-custom-n.json", "drawn/run.json",
          "drawn/samples/000001/1.png"),
    **own("align", "run/aligned/align.json", "run/aligned/sources.csv", "run/aligned/failures.csv", "run/aligned/p1/1.png"),
    **own("scores", "run/aligned/kept.csv", "run/scores/recogniser/scores.json", "run/scores/recogniser/histograms.npz",
          "run/scores/recogniser/metrics.json"),
    **own("train_fr", "run/fr/t/run.json", "run/fr/t/state.pt", "run/fr/t/probabilities.npy", "run/fr/faces.npy",
          "run/fr/faces.json", "run/fr/faces.index.npz"),
    **own("train_autoencoder", "training/t/autoencoder.json", "training/t/autoencoder_state.pt"),
    **own("train_autoencoder", "faces/faces/landmarks.npz", "faces/faces/landmarks.json", "faces/faces/crops-32-margin12.npy",
          settings=V),
    **own("train_diffusion", "training/t/diffusion_state.pt"),
    **own("train_diffusion", "faces/faces/contexts-recogniser.npy", "faces/faces/latents.npy", settings=V),
}


# ---- anything in the place of a file ---------------------------------------------------------------------------------

class Runs:
    """Pickled, it runs a program when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {MARK}",)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n%%EndComments\n%%EOF\n"


def link_to(target: str) -> Callable[[Path], object]:
    return lambda file: file.symlink_to(target)


def sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(2**40)


# Format -> what is wrong -> a file's bytes, or what makes it.
Inputs = dict[str, bytes | Callable[[Path], object]]
ANYTHING: Inputs = {
    "empty": b"", "one byte": b"\x80", "random bytes": np.random.default_rng(0).bytes(5000), "a web page": b"<!DOCTYPE html><html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "EPS": EPS,
    "a pickle with code": pickle.dumps(Runs()), "an old pickle with code": pickle.dumps(Runs(), 0), "zeros": bytes(100_000),
    "UTF-16": "name,name\n1,2\n".encode("utf-16"), "a whole zip of another": npz(other=np.zeros(3)), "half a terabyte": sparse,
    "a directory": lambda file: file.mkdir(), "a pipe": lambda file: os.mkfifo(file), "a dangling link": link_to("nowhere"),
    "a link loop": lambda file: file.symlink_to(file.name), "a device": link_to("/dev/zero")}


def png_of(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)) + extra
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def images() -> Inputs:
    picture = Image.open(io.BytesIO(face(3, 120)))
    saved = {kind: png(picture, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")}
    frames = [picture.convert("P")] * 2
    bomb = zlib.compress(bytes(20_000 * 2501))
    return {
        **{f"half a {kind}": data[: len(data) // 2] for kind, data in saved.items()},
        **{f"the head of a {kind}": data[:30] for kind, data in saved.items()},
        "20,000 x 20,000 of one bit": png_of(20_000, 20_000, bomb, 1, 0), "two billion wide": png_of(2**31 - 1, 2**31 - 1, b""),
        "no pixels": png_of(0, 0, b""), "a strip": png_of(16, 100_000, zlib.compress(bytes(49 * 100_000))),
        "too little data": png_of(500, 500, zlib.compress(bytes(100))), "GIF of 65,535": b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(20),
        "a text that unpacks to gigabytes": png_of(9, 9, zlib.compress(bytes(252)), extra=struct.pack(">I", 5) + b"zTXta\0\0x\x9c"
                                                   + bytes(4)),
        "wrong check sum": saved["PNG"][:29] + b"\0\0\0\0" + saved["PNG"][33:], "floats": png(Image.new("F", (50, 50)), "TIFF"),
        "32 bits": png(Image.fromarray(np.full((50, 50), 2**30, np.int32)), "TIFF"), "SVG": b"<svg xmlns='x' width='9'/>",
        "PPM of terabytes": b"P6 9999999 9999999 255\n", "PSD": b"8BPS\0\1" + bytes(40), "ICO": b"\0\0\1\0\1\0" + bytes(30),
        "XBM": b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {", "PDF": b"%PDF-1.4\n", "FITS": b"SIMPLE  =  T",
        "HEIC": b"\0\0\0\x18ftypheic" + bytes(99), "TIFF that points at itself": b"II*\0\x08\0\0\0\1\0" + bytes(12) + b"\x08\0\0\0",
        "BMP that lies": b"BM" + struct.pack("<IHHIIiiHH", 99, 0, 0, 54, 40, 2**30, -(2**30), 1, 24) + bytes(60),
        "an animation": png(frames[0], "GIF", save_all=True, append_images=frames[1:])[:-40], "JPEG of a thumb": b"\xff\xd8\xff\xe0"}


def arrays(good: dict[str, np.ndarray], key: str) -> Inputs:
    """An .npz file whose array `key` is not what it should be."""
    def member(header: str, body: bytes = b"", **options: int) -> bytes:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", **options) as archive:
            for name, array in good.items():
                if name != key:
                    archive.writestr(f"{name}.npy", npy(array))
            archive.writestr(f"{key}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + body)
        return data.getvalue()

    def head(descr: str, shape: str) -> str:
        return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    changed = {"NaN": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a), "infinite": lambda a: a * np.inf,
               "0-d": lambda a: a.ravel()[0], "3-d": lambda a: a[None], "complex": lambda a: a + 1j, "integers": lambda a: a.astype(int),
               "texts": lambda a: a.astype(str), "objects": lambda a: a.astype(object), "one row": lambda a: a[:1],
               "empty": lambda a: a[:0], "zeros": np.zeros_like, "booleans": lambda a: a > 0}
    whole = npz(**good)
    place = whole.index(b"PK\1\2")
    return {**{name: npz(**good | {key: change(good[key])}) for name, change in changed.items()},
            "terabytes": member(head("'<f4'", "(1000000000000,)")), "negative": member(head("'<f4'", "(-1, 4)"), bytes(16)),
            "objects by header": member(head("'|O'", "(3,)"), pickle.dumps(Runs())), "records": member(head("[('a','<f4')]", "(1,)")),
            "deep header": member("(" * 5000), "code in header": member("__import__('os').system('true')"),
            "a bomb": member(head("'<f4'", "(50000000,)"), bytes(200_000_000), compression=zipfile.ZIP_DEFLATED, compresslevel=1),
            "encrypted": whole[: place + 8] + b"\1" + whole[place + 9 :], "lacks it": npz(**{n: a for n, a in good.items() if n != key}),
            "cut": whole[:-30], "without its end": whole[: place]}


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def contexts() -> Inputs:
    rows = np.eye(8, 512, dtype=np.float32)
    ids = {"NUL": "a\0b", "surrogate": "a\ud800", "300 characters": "x" * 300, "a path": "../x", "absolute": "/tmp/x", "empty": "",
           "blank": "  ", "hidden": ".x", "a backslash": "a\\b", "a line": "a\nb", "an escape": "a\x1b[2J", "twice": "1"}

    def named(name: str) -> bytes:
        return npz(ids=np.array([name if k == 0 else str(k) for k in range(8)]), contexts=rows)
    by_id = {str(k): torch.from_numpy(row) for k, row in enumerate(rows)}
    return arrays({"ids": np.array(list(by_id)), "contexts": rows}, "contexts") | {f"id: {kind}": named(name) for kind, name in ids.items()
        if kind != "surrogate"} | {
        "seven ids": npz(ids=np.arange(7).astype(str), contexts=rows), "twice as long": npz(ids=np.array(list(by_id)), contexts=2 * rows),
        "npy of objects": npy(np.array([{}], dtype=object)), "npy, NaN": npy(rows * np.nan), "npy, cut": npy(rows)[:-9],
        "torch: code": torch_bytes({"0": Runs()}), "torch: a list": torch_bytes([1, 2]), "torch: cut": torch_bytes(by_id)[:-99],
        "torch: shapes differ": torch_bytes(by_id | {"9": torch.zeros(3)}), "torch: no vectors": torch_bytes({}),
        **{f"torch: {kind}": torch_bytes(by_id | {"1": tensor}) for kind, tensor in strange_tensors(rows[1]).items()}}


def strange_tensors(values: np.ndarray) -> dict[str, torch.Tensor]:
    tensor = torch.from_numpy(values)
    return {"sparse": tensor.to_sparse(), "complex": tensor + 0j, "NaN": tensor * torch.nan, "meta": tensor.to("meta"),
            "expanded": torch.zeros(()).expand(tensor.shape), "huge": torch.zeros(()).expand(2**40),
            "quantised": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)}


def weights(good: dict[str, torch.Tensor]) -> Inputs:
    name = next(name for name, tensor in good.items() if tensor.dim() > 1)
    legacy = {"_use_new_zipfile_serialization": False}

    def safetensors(header: str, body: bytes = b"") -> bytes:
        return struct.pack("<Q", len(header)) + header.encode() + body

    def one(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0, 4]") -> bytes:
        return safetensors(f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}', bytes(4))
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
    whole = torch_bytes(good)
    return {
        **{kind: torch_bytes(good | {name: tensor}) for kind, tensor in strange_tensors(good[name].numpy()).items()},
        "code": torch_bytes(good | {name: Runs()}), "old container with code": torch_bytes(good | {name: Runs()}, **legacy),
        "a program (TorchScript)": program.getvalue(), "a network": torch_bytes(torch.nn.Linear(1, 1)), "a number": torch_bytes(3),
        "one is missing": torch_bytes({key: value for key, value in good.items() if key != name}), "nothing": torch_bytes({}),
        "one too many": torch_bytes(good | {"extra": torch.zeros(1)}), "misshapen": torch_bytes(good | {name: torch.zeros(2, 3)}),
        "integers": torch_bytes(good | {name: good[name].int()}), "two of one name": torch_bytes(good | {f"module.{name}": good[name]}),
        "nested for ever": torch_bytes(nested({})), "cut": whole[: len(whole) // 2], "without its end": whole[:-200],
        "safetensors: terabytes": struct.pack("<Q", 2**40) + b"{" + bytes(99), "safetensors: no JSON": safetensors("{not json"),
        "safetensors: outside": one(offsets="[0, 400000000000]"), "safetensors: negative": one(shape="[-1]"),
        "safetensors: unknown type": one("F999"), "safetensors: too small": one(shape="[99999999999]"),
        "safetensors: deep": safetensors("[" * 50_000), "safetensors: other": one(), "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
        "GGUF": b"GGUF" + bytes(99), "gzip": b"\x1f\x8b\x08" + bytes(99), "a pickle that asks for memory": b"\x80\4\x8e"
        + struct.pack("<Q", 2**40) + b"."}


def nested(value: dict, levels: int = 200) -> dict:
    for _ in range(levels):
        value = {"model": value}
    return value


def configurations(good: str) -> Inputs:
    changed = {
        "T is true": ("T: 1000", "T: true"), "T is a text": ("T: 1000", "T: !!int abc"), "T is 10^9": ("T: 1000", "T: 1000000000"),
        "T is 1": ("T: 1000", "T: 1"), "another schedule": ("linear", "cosine"), "image of 4": ("image_size: ", "image_size: 4 # "),
        "image of 2^30": ("image_size: ", "image_size: 1073741824 # "), "an environment's": ("T: 1000", "T: ${oc.env:HOME}"),
        "channels -32": ("initial_channels: ", "initial_channels: -32 # "), "channels 10^9": ("initial_channels: ",
                                                                                             "initial_channels: 1000000000 # "),
        "heads of 0": ("attention_head_channels: ", "attention_head_channels: 0 # "), "of pixels": ("latent_diffusion: true", "a: 1"),
        "another target": ("input_channels: $", "unknown: 3\n  input_channels: $"), "tabs": ("diffusion:", "\tdiffusion:")}
    head = good.partition("model:")[0]
    return {**{kind: good.replace(*change).encode() for kind, change in changed.items()},
            "model is a list": f"{head}model: [1]\n".encode(), "model is a number": f"{head}model: 3\n".encode(),
            "code": b"a: !!python/object/apply:os.system ['touch " + MARK.encode() + b"']\n" + good.encode(),
            "aliases that multiply": "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 1}]\n" for k in range(9)).encode()
            + good.encode(), "an alias of itself": b"a: &a [*a]\n" + good.encode(), "deep": b"a: " + b"[" * 5000,
            "interpolations that multiply": "".join(f"x{k}: {'${x%d}' % (k - 1) * 9 if k else 1}\n" for k in range(9)).encode()
            + good.replace("T: 1000", "T: ${x8}").encode(), "a circle": good.replace("T: 1000", "T: ${diffusion.T}").encode(),
            "100,000 nodes": b"a:\n" + b"- 1\n" * 100_000, "a list": b"- 1\n", "two documents": good.encode() + b"---\na: 1\n",
            "not UTF-8": b"a: \xff\n" + good.encode(), "a long number": b"a: " + b"1" * 5000 + b"\n" + good.encode()}


def benchmarks() -> Inputs:
    images, same = pickle.loads(bin_of(range(10)))

    class Objects:
        def __reduce__(self) -> tuple:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)
    array = np.array(images[:2], dtype=object)
    return {
        "code": pickle.dumps((images, [Runs()])), "evaluates": pickle.dumps((images, same)).replace(b"]", b"cbuiltins\neval\n", 1),
        "objects": pickle.dumps((array, same)), "a type of objects with flags": pickle.dumps((Objects(), same)),
        "too few": pickle.dumps((images[:-1], same)), "nothing": pickle.dumps(([], [])), "a number": pickle.dumps(3),
        "no images": pickle.dumps(([b"x"] * 20, same)), "texts": pickle.dumps((["x"] * 20, same)), "all alike": pickle.dumps(
            (images[:4], same[:2])), "another size": pickle.dumps(([face(1, 50)] * 20, same)), "EPS": pickle.dumps(([EPS] * 20, same)),
        "labels of 7": pickle.dumps((images, [7] * 10)), "labels are texts": pickle.dumps((images, ["a"] * 10)),
        "huge images": pickle.dumps(([png_of(60_000, 60_000, b"")] * 20, same)), "cut": pickle.dumps((images, same))[:-50],
        "a memo of gigabytes": b"\x80\2]r\xff\xff\xff\x7f.", "bytes of terabytes": b"\x80\4\x8e" + struct.pack("<Q", 2**40) + b".",
        "deep": b"\x80\2" + b"]" * 50_000 + b"a" * 49_999 + b".", "holds itself": b"\x80\2]q\0h\0a.", "three parts": pickle.dumps((1, 2, 3)),
        "attributes of a class": b"\x80\2cnumpy\nndarray\nN}X\3\0\0\0newX\1\0\0\0xs\x86b.", "an opener": b"cbuiltins\nopen\n(S'out/ran'\nS'w'\ntR."}


def texts() -> dict[str, Inputs]:
    pairs = "10\t1\n" + "p0 0 1\np1 0 p2 0\n" * 10
    csv = "".join(f"{i:06d},{(i + 1) % 8:06d}\n" for i in range(8))
    points = "0.png " + "1 2 3 4 5 6 7 8 9 10 0.9\n"
    return {
        "pairs": {name: text.encode() for name, text in {
            "a path": pairs.replace("p2", "../p2"), "absolute": pairs.replace("p2", "/etc"), "NUL": pairs.replace("p2", "p\0"),
            "minus": pairs.replace("0 1", "0 -1"), "huge number": pairs.replace("0 1", "0 " + "9" * 5000), "cut": pairs[:-9],
            "folds that lie": pairs.replace("10", "99999999999"), "no header": pairs[5:], "a name": pairs.replace("p2", "nobody"),
            "one long line": "p " * 10**6}.items()},
        "custom CSV": {name: text.encode("utf-8", "surrogatepass") for name, text in {
            "long field": f"{'x' * 200_000},1\n{csv}", "unknown": csv.replace("000003", "x"), "itself": csv.replace("000000,000001", "000000,000000"),
            "twice": csv + csv, "one field": "000000\n" + csv, "open quote": '"' + csv, "NUL": csv.replace("000003", "00\0"),
            "lacks one": csv[14:], "surrogate": csv + "\ud800,000001\n"}.items()},
        "leave_out": {name: text.encode("utf-8", "surrogatepass") for name, text in {
            "misspelt": "p11\n", "other case": "P1\n", "surrogate": "\ud800\n", "NUL": "p1\0\n", "all": "".join(f"p{i}\n" for i in range(8)),
            "a path": "../p1\n", "long": "x" * 10**6}.items()},
        "keep-list": {"unknown": b"p1/77.png\n", "a path": b"../p1/0.png\n", "of one": b"p1/0.png\n"},
        "IJB-C face_tid_mid": {"cut": b"0.png 1\n", "text": b"0.png a b\n", "huge": b"0.png 99999999999999999999 1\n", "fewer": b"0.png 0 0\n",
                               "a path": "".join(f"../../../etc/passwd{k} 0 0\n" for k in range(8)).encode()},
        "IJB-C name_5pts_score": {"NaN": points.replace("1 2", "nan 2").encode() * 8, "on a line": points.encode() * 8, "cut": b"0.png 1\n"},
        "IJB-C template_pair_label": {"unknown": b"0 99 1\n0 1 0\n", "label 7": b"0 1 7\n", "all alike": b"0 1 1\n", "negative": b"-1 1 1\n0 1 0\n"}}


JSONS: Inputs = {"a list": b"[]", "null": b"null", "a number": b"3", "an object": b"{}", "NaN": b'{"decides": NaN}', "deep": b"[" * 100_000,
                 "a huge number": b'{"format": ' + b"9" * 5000 + b"}", "1e999": b'{"eer": 1e999}', "cut": b'{"format": 2, "dec',
                 "decides is a list": b'{"format": 2, "decides": [1]}', "decides nothing": b'{"format": 2, "decides": {}}'}
CSVS: Inputs = {"one column": b"identity\np1\n", "long field": b"identity,image\n" + b"x" * 200_000 + b",1\n", "NUL": b"identity,image\n\0,1\n",
                "no rows": b"identity,image\n", "a path": b"identity,image\n../../in/faces/p1,0.png\n", "no such": b"identity,image\nq,0.png\n",
                "sources of others": b"identity,image,sha256\nq,0.png,00\n", "reasons of others": b"identity,image,reason\np1,0.png,x\n"}
ARRAYS: Inputs = {"objects": npy(np.array([{}], dtype=object)), "another shape": npy(np.zeros((2, 3), np.uint8)), "texts": npy(np.array(["a"])),
                  "terabytes": b"\x93NUMPY\1\0\x46\0{'descr': '|u1', 'fortran_order': False, 'shape': (9000000000000,), }" + bytes(9)}


def inputs(folder: Path) -> dict[str, Inputs]:
    """Every hostile file by the format it stands in for; `folder` is a finished chain, whose valid files some are made of."""
    def state(name: str) -> dict[str, torch.Tensor]:
        return torch.load(folder / READERS[name].file, weights_only=True)
    rows = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    special = texts() | {
        "photograph, extracted": images(), "photograph, aligned": images(), "contexts": contexts(), "statistics": arrays(
            {"mean": rows.mean(axis=0), "covariance": np.cov(rows, rowvar=False)}, "covariance"), ".bin": benchmarks(),
        "configuration": configurations((folder / READERS["configuration"].file).read_text()),
        **{name: weights(state(name)) for name in ("diffusion model", "first stage", "recogniser")}}
    for name, reader in READERS.items():
        suffix = Path(reader.file).suffix if reader.own else ""
        special[name] = special.get(name, {}) | {".json": JSONS, ".csv": CSVS, ".npy": ARRAYS}.get(suffix, {})
    return {name: ANYTHING | special[name] for name in READERS}


# ---- trials ----------------------------------------------------------------------------------------------------------

def place(folder: Path, reader: Reader, content: bytes | Callable[[Path], object]) -> Path:
    """Put it where the reader reads it; `<stem>.<suffix>` of a name with a digest is found by its pattern."""
    file = folder / reader.file
    if reader.own and not file.exists():
        file = next(file.parent.glob(f"{file.name.partition('.')[0]}-*.{file.name.partition('.')[2]}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)
    return file


def judged(reader: Reader, file: Path, folder: Path, ended: Ended, reference: dict[str, str], may_be_read: bool) -> Counter:
    names = (file.name, file.stem, reader.settings[-1].partition("=")[0] if reader.settings else file.name, str(file.parent.name))
    bad = flaws(ended, names=names)
    bad["programs"] += (folder / MARK).exists()
    if ended.code == 0 and reader.stage == "align" and not reader.own:
        listed = (folder / "out/h/aligned/failures.csv").read_text(errors="replace")
        bad["wrong"] += not (may_be_read or file.name in listed)
    elif ended.code == 0 and reader.own:
        bad += compared(reference, STAGES[reader.stage].made(folder))
    elif ended.code == 0:
        bad["wrong"] += not may_be_read
    return bad


READABLE = {("leave_out", "empty"), ("photograph, extracted", "an animation"), ("photograph, aligned", "an animation")}


def prepared(folder: Path) -> None:
    write(folder / "in/h/p/good.png", face(2, 112))
    write(folder / "in/h/q/good.png", face(5, 112))


def trials(folders: dict[str, Path], every: int = 1, run: Callable | None = None) -> Iterator[Result]:
    """Yields the format, the fault and what was wrong, for every hostile input."""
    references = {}
    chosen = [(name, kind, content) for name, of_format in inputs(folders["finished"]).items() for kind, content in of_format.items()]
    for name, kind, content in chosen[::every]:
        reader = READERS[name]
        yield name, "hostile files", one(folders, name, kind, content, references, (name, kind) in READABLE, run)


def one(folders: dict[str, Path], name: str, kind: str, content: bytes | Callable, references: dict, may_be_read: bool,
        run: Callable | None = None) -> Counter:
    reader = READERS[name]
    stage, key = STAGES[reader.stage], (reader.stage, reader.settings)
    if reader.own and key not in references:
        with trial_folder(folders["finished"]) as folder:
            assert stage.run(folder, *reader.settings).code == 0
            references[key] = stage.made(folder)
    with trial_folder(folders["finished"]) as folder:
        prepared(folder)
        file = place(folder, reader, content)
        ended = run(stage, folder, *reader.settings) if run else stage.run(folder, *reader.settings)
        return show(judged(reader, file, folder, ended, references.get(key, {}), may_be_read), f"{name} ({file.name}): {kind}", ended)


FORMATS = ("photograph, extracted", "photograph, aligned", "contexts", "statistics", "diffusion model", "configuration", "recogniser",
           ".bin", "pairs", "IJB-C name_5pts_score", "custom CSV", "run/aligned/kept.csv", "drawn/run.json", "run/fr/t/state.pt")


def mutated(folders: dict[str, Path], times: int) -> Iterator[Result]:
    """Valid files of 14 formats with random damage: read, or refused in one line."""
    chance, references = random.Random(0), {}
    for name in FORMATS:
        file = folders["finished"] / READERS[name].file
        whole = file.read_bytes() if file.exists() else face(3, 120) if file.suffix == ".png" else (
            folders["finished"] / "in/a/n.csv").read_bytes()
        for number in range(times):
            yield name, "random damage", one(folders, name, f"damage {number}", damaged(whole, chance), references, True)


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Up to four flips, cuts, insertions, repetitions, or numbers that lie."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        match chance.choice(["flip", "cut", "remove", "insert", "repeat", "lie"]):
            case "flip" if place < len(data):
                data[place] ^= chance.randint(1, 255)
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + chance.randint(1, 40)]
            case "insert":
                data[place:place] = chance.randbytes(chance.randint(1, 20))
            case "repeat":
                data[place:place] = data[place : place + 40] * chance.randint(1, 5)
            case "lie":
                data[place : place + 4] = chance.choice([b"\xff" * 8, bytes(8), b"9" * 12, b"-1", b"nan", b"${a}", b"("])
    return bytes(data)


def command_line(folders: dict[str, Path], number: int = 40) -> Iterator[Result]:
    """Every so many of the hostile inputs as the script itself, with programs on PATH that leave a mark."""
    scripts = ("contexts", "negatives", "sample", "align", "scores", "verify")
    everything = [(name, kind, content) for name, of_format in inputs(folders["finished"]).items() for kind, content in of_format.items()
                  if READERS[name].stage in scripts and not READERS[name].own]
    with trial_folder(folders["finished"]) as programs:
        for program in ("gs", "convert", "magick", "ffmpeg", "touch", "sh", "curl"):
            write(programs / "bin" / program, f"#!/bin/bash\n: > {MARK}\n".encode())
            (programs / "bin" / program).chmod(0o755)

        def run(stage, folder: Path, *settings: str) -> Ended:
            begin = time.monotonic()
            from tests.faults.stages import SETTINGS
            done = subprocess.run([sys.executable, ROOT / f"{stage.script}.py", *SETTINGS, *stage.settings, *settings], cwd=folder,
                                  env=ENVIRONMENT | {"PATH": f"{programs / 'bin'}:{os.environ['PATH']}"}, capture_output=True)
            text = (done.stdout + done.stderr).decode(errors="replace")
            return Ended(done.returncode, text, time.monotonic() - begin, 0, [], [], [])
        for name, kind, content in everything[:: max(1, len(everything) // number)][:number]:
            yield name, "hostile files, command line", one(folders, name, kind, content, {}, (name, kind) in READABLE, run)
