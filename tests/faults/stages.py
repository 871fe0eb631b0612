"""A chain of all nine stages on tiny networks and drawn faces, to be disturbed.

A trial's folder holds `in` (faces, weights, lists) and `out` (paths.output); commands run there on relative paths, so that
records are the same wherever it lies.
"""
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import align
from models import random_weights
from models.backbones import BACKBONES
from models.sizes import SIZES
from tests.drawn_face import draw_face
from tests.faults.processes import Ended, Forked
from tests.tiny_generator import TINY, shrink
from tests.tiny_training import TinyNet
from utils.faces.template import TEMPLATES
from utils.identities.contexts import uniform
from utils.recognition import dynunc, recogniser_training

SETTINGS = [
    "paths.output=out", "paths.run=run", "device=cpu", "contexts.source=uniform", "contexts.dimension=512", "contexts.number=8",
    "contexts.name=c", "negatives.strategy=custom", "negatives.custom_file=in/a/n.csv", "model.diffusion=in/weights",
    "model.first_stage_encoder=in/weights/first_stage_encoder_state_dict.pt",
    "model.first_stage_decoder=in/weights/first_stage_decoder_state_dict.pt", "sampling.identities=8",
    "sampling.images_per_identity=3", "sampling.batch_size=4", "sampling.solver=dpm++", "sampling.steps=3",
    "sampling.precision=fp32",
    "align.processes=2", "scores.recogniser=in/recogniser.pth", "fr.backbone=iresnet18", "fr.batch_size=4", "fr.epochs=4",
    "fr.name=t", "fr.is_original_train=true", "verify.backbone=in/recogniser.pth", "verify.bins=in/bins", "verify.ijbc=in/ijbc",
    "training.faces=in/faces", "contexts.recogniser=in/recogniser.pth", "training.size=tiny", "training.name=t",
    "training.compile=false", "training.precision=fp32", "training.length=8steps", "diffusion.batch_size=4"]


@dataclass(frozen=True)
class Stage:
    """A script, the artifacts that are compared (globs), and further settings; `other` ones make other artifacts."""

    script: str
    artifacts: tuple[str, ...]
    settings: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    ranks: int = 0  # that it is tried with, dying

    def main(self) -> None:
        importlib.import_module(self.script).main()

    def start(self, folder: Path, *settings: str, prepare: Callable[[], object] = lambda: None) -> Forked:
        return Forked(self.main, *SETTINGS, *self.settings, *settings, prepare=prepare, folder=folder)

    def run(self, folder: Path, *settings: str, prepare: Callable[[], object] = lambda: None) -> Ended:
        return self.start(folder, *settings, prepare=prepare).wait()

    def made(self, folder: Path) -> dict[str, str]:
        """The artifacts and their digests, but for what rank files hold and what records say of versions and settings."""
        files = [file for pattern in self.artifacts for file in (folder / "out").glob(pattern) if "rank" not in file.name]
        return {str(file.relative_to(folder)): digest(file) for file in files if file.is_file()}


STAGES = {
    "contexts": Stage("create_sample_identity_contexts", ("contexts/?.npz",), (), ("contexts.seed=3",)),
    "negatives": Stage("create_negative_contexts", ("contexts/*negatives-*.npz",), (), ("negatives.custom_file=in/b/n.csv",)),
    "sample": Stage("sample", ("drawn/samples/*/*.png",), ("paths.run=drawn",), ("sampling.seed=1",), ranks=2),
    "align": Stage("align", ("run/aligned/*/*.png", "run/aligned/*.csv"), (), ("align.template=arcface_shifted",), ranks=2),
    "scores": Stage("plot_distributions", ("run/scores/*/*.npz", "run/scores/*/metrics.json"), (),
                    ("scores.recogniser=in/b/recogniser.pth",)),
    "train_fr": Stage("train_fr", ("run/fr/t/backbone.safetensors", "run/fr/t/keep_0.5.txt", "run/fr/t/held_out.json"), (),
                      ("fr.seed=1",), ranks=2),
    "verify": Stage("verify_fr", ("verification/*/verification.json",), (), ("verify.backbone=in/b/recogniser.pth",)),
    "train_autoencoder": Stage("train_autoencoder", ("training/*/first_stage_*.safetensors",), ("training.length=12steps",),
                               ("training.leave_out=in/left.txt", "training.name=u")),
    "train_diffusion": Stage("train_diffusion", ("training/*/checkpoints/*", "training/*/*.npz"), (), (
        "training.leave_out=in/left.txt", "training.name=u",
        *(f"model.first_stage_{half}=out/training/t/first_stage_{half}.safetensors" for half in ("encoder", "decoder")))),
}


def digest(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            values = json.loads(content)
            content = json.dumps({key: values[key] for key in values.keys() - {"config", "versions"}}, sort_keys=True).encode()
        except (ValueError, AttributeError):
            pass
    return hashlib.sha256(content).hexdigest()


def copy(source: Path, target: Path) -> Path:
    """A trial's folder: files are links, since the stages replace them; the one that is written in place is a copy."""
    in_place = ("probabilities.npy",)
    shutil.copytree(source, target, symlinks=True, copy_function=lambda a, b, **_: (
        shutil.copy2 if os.path.basename(a) in in_place else os.link)(a, b))
    return target


def chain(folder: Path) -> dict[str, Path]:
    """Every stage run undisturbed: folders as they were before each, and `finished`."""
    shrink_networks()
    prepare(folder / "base")
    before = {}
    for name, stage in STAGES.items():
        before[name] = copy(folder / "base", folder / "before" / name)
        ended = stage.run(folder / "base")
        assert ended.code == 0 and stage.made(folder / "base"), (name, ended)
    return before | {"finished": folder / "base"}


def shrink_networks() -> None:
    torch.set_num_threads(1), cv2.setNumThreads(1)  # threads do not survive a fork
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # or scikit-learn asks the program lscpu
    BACKBONES["iresnet18"], SIZES["tiny"] = TinyNet, TINY
    align.BATCH, recogniser_training.HELD_OUT_PART, dynunc.WINDOW = 4, 3, 3
    for stage in STAGES.values():
        module = importlib.import_module(stage.script)
        if stage.script in ("train_autoencoder", "train_diffusion"):
            shrink(module)


# ---- what the stages read --------------------------------------------------------------------------------------------

def prepare(folder: Path) -> None:
    """Eight people with three photographs each, one of them without a face; weights, recognisers, lists, benchmarks."""
    source = folder / "in"
    for i in range(8):
        for k in range(3):
            write(source / "faces" / f"p{i}" / f"{k}.png", face(i, 96 + 16 * k))
    write(source / "faces" / "p7" / "9.png", png(np.full((120, 100, 3), 90, np.uint8)))
    shutil.copytree(source / "faces", folder / "out" / "run" / "samples")  # as if they were drawn
    random_weights.write(source / "weights", "small")
    for seed, where in enumerate((source, source / "b")):
        torch.manual_seed(seed)
        write(where / "recogniser.pth", torch_bytes(BACKBONES["mobilefacenet"](0.0).state_dict()))
    for step, name in ((1, "a"), (3, "b")):
        write(source / name / "n.csv", "".join(f"{i:06d},{(i + step) % 8:06d}\n" for i in range(8)).encode())
    write(source / "left.txt", b"p1\n")
    write(source / "keep.txt", "".join(f"p{i}/{k}.png\n" for i in range(8) for k in range(3)).encode())
    write(source / "statistics.npz", statistics(1))
    write(source / "published.npz", npz(ids=np.array([f"id{i}" for i in range(8)]), contexts=uniform(8, 512, 7)))
    benchmarks(source)


def benchmarks(source: Path) -> None:
    """Ten pairs as lfw.bin and as pairs.txt, and IJB-C of eight images."""
    write(source / "bins" / "lfw.bin", bin_of(range(10)))
    write(source / "pairs.txt", ("10\t1\n" + "p0 0 1\np1 0 p2 0\n" * 10).encode())
    ijbc, points = source / "ijbc", TEMPLATES["arcface"].ravel()
    for k in range(8):
        write(ijbc / "loose_crop" / f"{k}.png", face112(k // 2, k))
    lines = {"face_tid_mid": [f"{k}.png {k // 2} {k}" for k in range(8)],
             "name_5pts_score": [f"{k}.png {' '.join(map(str, points))} 0.9" for k in range(8)],
             "template_pair_label": [f"{a} {b} {int(a == b)}" for a in range(4) for b in range(a, 4)]}
    for name, rows in lines.items():
        write(ijbc / "meta" / f"ijbc_{name}.txt", "".join(f"{row}\n" for row in rows).encode())


def bin_of(people: Iterable[int]) -> bytes:
    """A benchmark of one pair a person, every second of which is of two people."""
    same = [k % 2 == 0 for k, _ in enumerate(people)]
    return pickle.dumps(([face112(i + (side and not match), side) for i, match in zip(people, same, strict=True)
                          for side in range(2)], same))


def statistics(seed: int) -> bytes:
    rows = np.random.default_rng(seed).standard_normal((64, 512)).astype(np.float32)
    return npz(mean=rows.mean(axis=0), covariance=np.cov(rows, rowvar=False).astype(np.float32))


def write(file: Path, content: bytes) -> None:
    """A new file: what was linked there stays as it is elsewhere."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def png(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
    return data.getvalue()


def face(person: int, size: int) -> bytes:
    return png(draw_face(size, tuple(np.random.default_rng(person).integers(150, 240, 3).tolist())))


def face112(person: int, shift: int) -> bytes:
    image = draw_face(112, tuple(np.random.default_rng(person).integers(150, 240, 3).tolist()))
    return png(np.roll(image, shift, axis=1))


def npz(**arrays: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def torch_bytes(value: object, **options) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()
