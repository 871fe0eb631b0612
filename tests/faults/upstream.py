"""After a finished chain something upstream changes, and the stage downstream runs again: is it noticed?

Noticed: the stage refuses in one line, or makes what it would make of the changed inputs in a fresh folder. Whatever else comes
out is silently old or mixed.
"""
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load, save

from models import random_weights
from tests.faults.judging import Result, Trial, flaws, show, trial_folder
from tests.faults.stages import STAGES, bin_of, face, png, statistics, write
from utils.identities import contexts as identity_contexts
from utils.runtime.files import array_digest

PHOTOS, FACES, ALIGNED = "out/run/samples", "in/faces", "out/run/aligned"

RECORDS = """contexts/c.json contexts
contexts/*negatives*.json negatives
drawn/run.json sample
run/aligned/align.json align
run/scores/*/scores.json scores
run/fr/t/run.json train_fr
training/t/autoencoder.json train_autoencoder
training/t/diffusion.json train_diffusion""".splitlines()
PRODUCTS = """run/aligned/sources.csv align
run/aligned/failures.csv align
run/aligned/kept.csv align
run/scores/*/histograms.npz scores
run/scores/*/embeddings.npz scores
run/fr/t/state.pt train_fr
run/fr/t/backbone.safetensors train_fr
run/fr/t/probabilities.npy train_fr
run/fr/faces-*.npy train_fr
run/fr/faces-*.index.npz train_fr
training/t/first_stage_decoder.safetensors train_autoencoder
training/t/diffusion_state.pt train_diffusion""".splitlines()
CACHES = """run/fr/faces-*.npy train_fr fr.name
run/fr/faces-*.index.npz train_fr fr.name
faces/faces/landmarks.npz train_autoencoder training.name
faces/faces/crops-*.npy train_autoencoder training.name
faces/faces/contexts-*.npy train_diffusion training.name
faces/faces/latents-*.npy train_diffusion training.name""".splitlines()


@dataclass(frozen=True)
class Change:
    """What is changed in a trial's folder, and the stages that run again.

    Attributes:
        settings: further settings of the stage. then: of the run after the change.
        cache: what is changed is a cache: it must be noticed by whoever uses it next, under `settings`.
    """

    artifact: str
    change: Callable[[Path], object]
    stages: str
    settings: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    cache: bool = False


# ---- changes ---------------------------------------------------------------------------------------------------------

def put(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: write(folder / name, content if isinstance(content, bytes) else (folder / content).read_bytes())


def edit(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Of whatever there is of this name."""
    return lambda folder: [write(file, change(file.read_bytes())) for file in folder.glob(pattern)]


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def exchange(a: str, b: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        first, second = (folder / a).read_bytes(), (folder / b).read_bytes()
        write(folder / a, second), write(folder / b, first)
    return change


def rolled(arrays: str, digest: Callable | None = None) -> Callable[[Path], object]:
    """The rows of an .npz file of contexts or negatives moved by one; with `digest` the record beside it says so."""
    def change(folder: Path) -> None:
        file = next(folder.glob(arrays))
        with np.load(file) as stored:
            values = dict(stored)
        name = "negatives" if "negatives" in values else "contexts"
        values[name] = np.roll(values[name], 1, axis=0)
        data = io.BytesIO()
        np.savez(data, **values)
        write(file, data.getvalue())
        if digest:
            record = json.loads(file.with_suffix(".json").read_text())
            record["digest"] = digest(values)
            write(file.with_suffix(".json"), json.dumps(record).encode())
    return change


def middle(content: bytes) -> bytes:
    """Other numbers in the middle of an array, whose form stays."""
    place = len(content) // 2
    return content[:place] + bytes(255 - byte for byte in content[place : place + 4000]) + content[place + 4000 :]


def first_byte(content: bytes) -> bytes:
    tensors = load(content)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    return save(tensors | {name: tensors[name] * 1.01})


def photo_changes(root: str, stages: str, settings: tuple[str, ...] = ()) -> list[Change]:
    other, name = face(11, 104), Path(root).name
    return [Change(f"{name}: {what}", change, stages, settings) for what, change in {
        "replaced by another person's": put(f"{root}/p0/0.png", other), "removed": remove(f"{root}/p0/0.png"),
        "added": put(f"{root}/p0/5.png", other), "repaired": put(f"{root}/p7/9.png", other),
        "damaged": edit(f"{root}/p2/1.png", lambda content: content[:200]), "exchanged": exchange(
            f"{root}/p1/0.png", f"{root}/p2/0.png"), "a person renamed": lambda folder: os.rename(
            folder / root / "p3", folder / root / "q3"), "a person removed": remove(f"{root}/p4/*")}.items()]


def changes() -> list[Change]:
    """Every upstream artifact, changed."""
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write(folder, "small", seed=1)
        weights = {name: (Path(folder) / name).read_bytes() for name in (
            "checkpoints/ema_averaged_model.ckpt", random_weights.ENCODER_FILE, random_weights.DECODER_FILE)}
    extracted = ("contexts.source=extracted", "contexts.faces=in/faces", "contexts.name=x")
    published = ("contexts.source=published", "contexts.file=in/published.npz", "contexts.name=x")
    gaussian = ("contexts.source=gaussian", "contexts.statistics=in/statistics.npz", "contexts.name=x", "contexts.number=8")
    training, fr = ("training.name=v",), ("fr.name=v",)
    blank = png(np.full((112, 112, 3), 200, np.uint8))
    return [
        *photo_changes(PHOTOS, "align"), *photo_changes(FACES, "contexts", extracted),
        *photo_changes(FACES, "train_autoencoder train_diffusion"),
        Change("recogniser replaced", put("in/recogniser.pth", "in/b/recogniser.pth"),
               "scores verify train_autoencoder train_diffusion"),
        Change("recogniser replaced", put("in/recogniser.pth", "in/b/recogniser.pth"), "contexts", extracted),
        Change("published contexts replaced", rolled("in/published.npz"), "contexts", published),
        Change("statistics replaced", edit("in/statistics.npz", lambda content: statistics(2)), "contexts", gaussian),
        Change("custom CSV replaced", put("in/a/n.csv", "in/b/n.csv"), "negatives"),
        Change("contexts exchanged", rolled("out/contexts/c.npz"), "negatives sample"),
        Change("contexts and record exchanged", rolled("out/contexts/c.npz", lambda values: identity_contexts.digest(
            values["ids"].tolist(), values["contexts"])), "negatives sample"),
        Change("contexts cut", edit("out/contexts/c.npz", lambda content: content[:-300]), "negatives sample"),
        Change("negatives exchanged", rolled("out/contexts/*negatives*.npz"), "sample"),
        Change("negatives and record exchanged", rolled("out/contexts/*negatives*.npz", lambda values: array_digest(
            values["negatives"])), "sample"),
        *(Change(f"weights: {name}", put(f"in/weights/{name}", content), "sample") for name, content in weights.items()),
        Change("configuration: eps is v", edit("in/weights/.hydra/config.yaml", lambda content: content.replace(
            b"schedule_type", b"prediction: v\n  schedule_type")), "sample"),
        Change("configuration: image size", edit("in/weights/.hydra/config.yaml", lambda content: content.replace(
            b"image_size: ", b"image_size: 2")), "sample"),
        Change("first stage of the training replaced", edit("out/training/t/first_stage_*.safetensors", first_byte),
               "train_diffusion"),
        Change("sample removed", remove("out/drawn/samples/*/0.png"), "sample"),
        Change("sample without its middle", edit("out/drawn/samples/*/1.png", lambda png: png[:200] + png[260:]), "sample"),
        Change("aligned face replaced", put(f"{ALIGNED}/p0/0.png", blank), "scores train_fr"),
        Change("aligned face of another person", put(f"{ALIGNED}/p0/0.png", f"{ALIGNED}/p1/0.png"), "scores train_fr"),
        Change("aligned faces exchanged", exchange(f"{ALIGNED}/p0/0.png", f"{ALIGNED}/p1/0.png"), "scores train_fr"),
        Change("aligned face removed", remove(f"{ALIGNED}/p0/0.png"), "align scores train_fr"),
        Change("kept.csv shorter", edit(f"{ALIGNED}/kept.csv", lambda text: text[: text.index(b"p7")]), "scores train_fr"),
        Change("template in align.json", edit(f"{ALIGNED}/align.json", lambda text: text.replace(b'"arcface"',
               b'"arcface_shifted"')), "scores align"),
        Change("benchmark replaced", put("in/bins/lfw.bin", bin_of(np.arange(10)[::-1])), "verify"),
        Change("loose crop replaced", put("in/ijbc/loose_crop/0.png", face(12, 120)), "verify"),
        Change("leave_out longer", put("in/left.txt", b"p1\np2\n"), "train_fr", ("fr.leave_out=in/left.txt", *fr)),
        Change("leave_out longer", put("in/left.txt", b"p1\np2\n"), "train_autoencoder train_diffusion",
               ("training.leave_out=in/left.txt", *training, *STAGES["train_diffusion"].other[2:])),
        Change("keep-list shorter", edit("in/keep.txt", lambda text: text[len(b"p0/0.png\n"):]), "train_fr",
               ("fr.keep_list=in/keep.txt", *fr)),
        *(Change(f"record lost: {name}", remove(f"out/{name}"), stage, then=then)
          for name, stage in map(str.split, RECORDS) for then in ((), STAGES[stage].other)),
        *(Change(f"lost: {name}", remove(f"out/{name}"), stage) for name, stage in map(str.split, PRODUCTS)),
        *(Change(f"{what}: {name}", change, stage, (f"{setting}=v",), cache=True)
          for name, stage, setting in map(str.split, CACHES)
          for what, change in {"changed in the middle": edit(f"out/{name}", middle), "lost": remove(f"out/{name}"), "record lost":
                               remove("out/" + name.replace(".index", "")[:-4] + ".json")}.items()),
    ]


def is_alike(a: Path, b: Path) -> bool:
    """Whether images differ by one grey level at most: faces that were detected among other ones do."""
    if a.suffix != ".png":
        return False
    first, second = (np.asarray(Image.open(file)).astype(int) for file in (a, b))
    return first.shape == second.shape and np.abs(first - second).max() <= 1


def trials(folders: dict[str, Path]) -> Iterator[Trial]:
    for change in changes():
        yield from (partial(trial, folders, change, name) for name in change.stages.split())


def trial(folders: dict[str, Path], change: Change, name: str) -> Result:
    stage = STAGES[name]
    with trial_folder(folders["finished"]) as folder, trial_folder(folders[name]) as other:
        if not change.cache:
            first = stage.run(folder, *change.settings)
            assert first.code == 0, (change.artifact, name, first)
            change.change(other)
        change.change(folder)
        again, fresh = (stage.run(each, *change.settings, *change.then) for each in (folder, other))
        found, expected, bad = stage.made(folder), stage.made(other), flaws(again) + flaws(fresh)
        if again.code == 0:
            if name != "align":  # what is made may have a name of its own, beside the earlier one's
                found = {file: found[file] for file in found.keys() & expected.keys()}
            bad["wrong"] += fresh.code != 0 or found.keys() != expected.keys() or any(
                found[file] != expected[file] and not is_alike(folder / file, other / file) for file in found)
        return name, "upstream changed", show(bad, f"{name}, {change.artifact} {change.then}", again, fresh)
