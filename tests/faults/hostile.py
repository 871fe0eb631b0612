"""Hostile files, each in the place of a valid one: what does the command say that reads it?

Allowed is one line that names the file or a setting, with exit code 2, or the right result: the same artifacts where a file of
the project's own is made again, and a photograph that is listed as failed.
"""
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.faults import hostile_inputs
from tests.faults.hostile_inputs import MARK, Inputs, damaged
from tests.faults.judging import Result, Trial, compared, flaws, show, trial_folder
from tests.faults.processes import ENVIRONMENT, Ended
from tests.faults.stages import SETTINGS, STAGES, Stage, face, write
from utils.runtime.errors import ROOT


@dataclass(frozen=True)
class Reader:
    """Where a file lies, and the stage and its settings that read it. `own`: the project made it, and may make it again."""

    file: str
    stage: str
    settings: tuple[str, ...] = ()
    own: bool = False


def own(stage: str, files: str, *settings: str) -> dict[str, Reader]:
    return {file: Reader(f"out/{file}", stage, settings, own=True) for file in files.split()}


def from_file(source: str, setting: str, file: str) -> Reader:
    return Reader(file, "contexts", (f"contexts.source={source}", "contexts.name=h", f"{setting}={file}"))


def meta(name: str) -> dict[str, Reader]:
    return {f"IJB-C {name}": Reader(f"in/ijbc/meta/ijbc_{name}.txt", "verify", ("verify.bins=",))}


READERS = {
    "photograph, extracted": Reader("in/h/p/x.png", "contexts", (
        "contexts.source=extracted", "contexts.name=h", "contexts.faces=in/h")),
    "photograph, aligned": Reader("in/h/p/x.png", "align", ("paths.run=h", "align.images=in/h")),
    "contexts": from_file("published", "contexts.file", "in/published.npz"),
    "statistics": from_file("gaussian", "contexts.statistics", "in/statistics.npz"),
    "diffusion model": Reader("in/weights/checkpoints/ema_averaged_model.ckpt", "sample", ("paths.run=h",)),
    "configuration": Reader("in/weights/.hydra/config.yaml", "sample", ("paths.run=h",)),
    "first stage": Reader("in/weights/first_stage_decoder_state_dict.pt", "sample", ("paths.run=h",)),
    "recogniser": Reader("in/recogniser.pth", "verify"), ".bin": Reader("in/bins/lfw.bin", "verify"),
    "pairs": Reader("in/pairs.txt", "verify", ("verify.bins=", "verify.ijbc=", "verify.lfw_faces=out/run/aligned",
                                               "verify.lfw_pairs=in/pairs.txt")),
    **meta("face_tid_mid"), **meta("name_5pts_score"), **meta("template_pair_label"),
    "leave_out": Reader("in/left.txt", "train_fr", ("fr.name=v", "fr.leave_out=in/left.txt")),
    "keep-list": Reader("in/keep.txt", "train_fr", ("fr.name=v", "fr.keep_list=in/keep.txt")),
    "custom CSV": Reader("in/h.csv", "negatives", ("negatives.custom_file=in/h.csv",)),
    **own("negatives", "contexts/c.npz contexts/c.json"),
    **own("sample", "contexts/c.negatives-custom-n.npz contexts/c.negatives-custom-n.json "
          "drawn/run.json drawn/samples/000001/1.png"),
    **own("align", "run/aligned/align.json run/aligned/sources.csv run/aligned/failures.csv run/aligned/p1/1.png"),
    **own("scores", "run/aligned/kept.csv run/scores/recogniser/scores.json run/scores/recogniser/histograms.npz "
          "run/scores/recogniser/metrics.json"),
    **own("train_fr", "run/fr/t/run.json run/fr/t/state.pt run/fr/t/probabilities.npy run/fr/t/backbone.safetensors "
          "run/fr/faces-*.npy run/fr/faces-*[0-9a-f].json run/fr/faces-*.index.npz"),
    **own("train_autoencoder", "training/t/autoencoder.json training/t/autoencoder_state.pt"),
    **own("train_autoencoder", "faces/faces/landmarks.npz faces/faces/landmarks.json faces/faces/crops-*.npy", "training.name=v"),
    **own("train_diffusion", "training/t/diffusion_state.pt training/t/first_stage_decoder.safetensors"),
    **own("train_diffusion", "faces/faces/contexts-*.npy faces/faces/latents-*.npy", "training.name=v"),
}
READABLE = {("leave_out", "empty"), ("leave_out", "a device")}  # nobody is left out
FORMATS = ("photograph, extracted", "photograph, aligned", "contexts", "statistics", "diffusion model", "configuration",
           "recogniser", ".bin", "pairs", "IJB-C name_5pts_score", "custom CSV", "run/aligned/kept.csv", "drawn/run.json",
           "run/fr/t/state.pt")


def inputs(folder: Path) -> dict[str, Inputs]:
    """Every hostile file, by the reader it is for; `folder` is a finished chain, of whose files some are made."""
    with warnings.catch_warnings(action="ignore"):  # torch's of strange tensors
        with np.load(folder / READERS["statistics"].file) as stored:
            good = dict(stored)
        special = hostile_inputs.TEXTS | {
            "photograph, extracted": hostile_inputs.images(), "photograph, aligned": hostile_inputs.images(),
            "contexts": hostile_inputs.contexts(), "statistics": hostile_inputs.arrays(good, "covariance"),
            ".bin": hostile_inputs.benchmarks(),
            "configuration": hostile_inputs.configurations((folder / READERS["configuration"].file).read_text()),
            **{name: hostile_inputs.weights(torch.load(folder / READERS[name].file, weights_only=True))
               for name in ("diffusion model", "first stage", "recogniser")}}
    return {name: hostile_inputs.ANYTHING | (hostile_inputs.OWN.get(Path(reader.file).suffix, {}) if reader.own
                                             else special[name]) for name, reader in READERS.items()}


@dataclass
class Place:
    """One trial after the other, on copies of a finished chain. `run`: otherwise than in a fork."""

    finished: Path
    run: Callable[..., Ended] | None = None
    references: dict[Reader, dict[str, str]] = field(default_factory=dict)

    def __call__(self, name: str, kind: str, content: bytes | Callable[[Path], object], may_be_read: bool, fault: str) -> Result:
        reader = READERS[name]
        stage = STAGES[reader.stage]
        if reader.own and reader not in self.references:
            with trial_folder(self.finished) as folder:
                assert stage.run(folder, *reader.settings).code == 0
                self.references[reader] = stage.made(folder)
        with trial_folder(self.finished) as folder:
            for person in ("p", "q"):
                write(folder / "in/h" / person / "good.png", face(2, 112))
            file = next(folder.glob(reader.file), folder / reader.file)
            file.unlink(missing_ok=True)
            content(file) if callable(content) else file.write_bytes(content)
            ended = (self.run or Stage.run)(stage, folder, *reader.settings)
            setting = reader.settings[-1].partition("=")[0] if reader.settings else file.name
            bad = flaws(ended, names=(file.name, file.stem, file.parent.name, setting))
            bad["programs"] += (folder / MARK).exists()
            if ended.code == 0 and reader.own:
                bad += compared(self.references[reader], stage.made(folder))
            elif ended.code == 0 and name == "photograph, aligned":
                bad["wrong"] += not may_be_read and "p,x.png" not in (folder / "out/h/aligned/failures.csv").read_text()
            elif ended.code == 0:
                bad["wrong"] += not may_be_read
            return name, fault, show(bad, f"{name} ({file.name}): {kind}", ended)


def trials(folders: dict[str, Path]) -> Iterator[Trial]:
    trial = Place(folders["finished"])
    for name, kind, content in flat(inputs(folders["finished"])):
        yield partial(trial, name, kind, content, (name, kind) in READABLE, "hostile file")


def flat(by_reader: dict[str, Inputs]) -> list[tuple]:
    return [(name, kind, content) for name, of_reader in by_reader.items() for kind, content in of_reader.items()]


def mutated(folders: dict[str, Path], times: int = 30) -> Iterator[Trial]:
    """Valid files of 14 formats with random damage, which may be read where it does no harm."""
    chance, trial = random.Random(0), Place(folders["finished"])
    for name in FORMATS:
        file = folders["finished"] / READERS[name].file
        whole = file.read_bytes() if file.exists() else face(3, 120) if file.suffix == ".png" else hostile_inputs.CSV.encode()
        for number in range(times):
            yield partial(trial, name, f"damage {number}", damaged(whole, chance), True, "random damage")


def command_line(folders: dict[str, Path], number: int = 40) -> Iterator[Trial]:
    """`number` of the hostile files to the scripts themselves, with programs on PATH that leave a mark."""
    with trial_folder(folders["finished"]) as programs:
        for program in ("gs", "convert", "magick", "ffmpeg", "touch", "sh", "curl"):
            write(programs / "bin" / program, f"#!/bin/bash\n: > {MARK}\n".encode())
            (programs / "bin" / program).chmod(0o755)

        def run(stage: Stage, folder: Path, *settings: str) -> Ended:
            begin = time.monotonic()
            done = subprocess.run([sys.executable, ROOT / f"{stage.script}.py", *SETTINGS, *stage.settings, *settings],
                                  cwd=folder, env=ENVIRONMENT | {"PATH": f"{programs / 'bin'}:{os.environ['PATH']}"},
                                      capture_output=True)
            text = (done.stdout + done.stderr).decode(errors="replace")
            return Ended(done.returncode, text, time.monotonic() - begin, 0, [], [], [])
        trial = Place(folders["finished"], run)
        strangers = flat({name: of_reader for name, of_reader in inputs(folders["finished"]).items()
                          if not READERS[name].own and READERS[name].stage != "train_fr"})
        for name, kind, content in strangers[:: len(strangers) // number][:number]:
            yield partial(trial, name, kind, content, False, "hostile file, command line")
