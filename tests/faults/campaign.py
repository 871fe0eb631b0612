"""Every stage killed, starved and disturbed, then run again: what is lost, what is wrong? Run by `make faults`.

    python -m tests.faults.campaign [kills per stage] [stages, whose predecessors then run undisturbed]

Stages run on tiny networks and drawn faces, each trial in a fork of this process, whose libraries are loaded. A trial is
disturbed once: killed at a moment of its work, killed just before or just after a rename, or refused a write (full disk). Then
the same command runs to its end, and its artifacts are compared, byte for byte, with those of an undisturbed run. Prints the
table of docs/reliability.md.
"""
import errno
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import random_weights
from models.backbones import BACKBONES
from models.sizes import SIZES
from tests.drawn_face import draw_face
from tests.tiny_generator import TINY, shrink
from tests.tiny_training import TinyNet
from utils.recognition import dynunc, recogniser_training
from utils.runtime.errors import run_script

KILLS, RENAMES, DISKS = 20, 8, 4
LIMIT = 60  # seconds a trial may take before it counts as hanging
# Stage -> (script, the artifacts that are compared, further settings).
STAGES = {
    "contexts": ("create_sample_identity_contexts", ["contexts/*seed3.npz"], ["contexts.seed=3"]),
    "negatives": ("create_negative_contexts", ["contexts/*negatives-mid.npz"], ["negatives.strategy=mid"]),
    "sample": ("sample", ["run/samples/*/*.png"], []),
    "align": ("align", ["run/aligned/*/*.png", "run/aligned/*.csv"], []),
    "scores": ("plot_distributions", ["run/scores/*/*.npz", "run/scores/*/metrics.json"], []),
    "train_fr": ("train_fr", ["run/fr/t/backbone.safetensors", "run/fr/t/keep_0.5.txt", "run/fr/t/held_out.json"], []),
    "train_autoencoder": ("train_autoencoder", ["training/t/first_stage_*.safetensors"], ["training.length=12steps"]),
    "train_diffusion": ("train_diffusion", ["training/t/checkpoints/*", "training/t/*.npz"], ["training.length=8steps"]),
}


def prepare(folder: Path) -> list[str]:
    """Weights, faces and a recogniser in `folder`; the settings that use them."""
    random_weights.write(folder / "weights", "small")
    people = np.random.default_rng(0).integers(150, 240, (8, 3))
    for i, skin in enumerate(people):
        for k in range(3):
            file = folder / "faces" / f"p{i}" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_face(96 + 16 * k, tuple(skin.tolist()))).save(file)
    torch.manual_seed(0)
    torch.save(BACKBONES["mobilefacenet"](0.0).state_dict(), folder / "recogniser.pth")
    weights = folder / "weights"
    return ["device=cpu", "paths.run=run", "contexts.source=uniform", "contexts.dimension=512", "contexts.number=8",
            f"model.diffusion={weights}", f"model.first_stage_encoder={weights}/first_stage_encoder_state_dict.pt",
            f"model.first_stage_decoder={weights}/first_stage_decoder_state_dict.pt", "sampling.identities=8",
            "sampling.images_per_identity=3", "sampling.batch_size=4", "sampling.steps=3", "sampling.precision=fp32",
            f"align.images={folder}/faces", "align.processes=1", f"scores.recogniser={folder}/recogniser.pth",
            "fr.backbone=iresnet18", "fr.batch_size=4", "fr.epochs=4", "fr.name=t", "fr.is_original_train=true",
            f"training.faces={folder}/faces", f"contexts.recogniser={folder}/recogniser.pth", "training.size=tiny",
            "training.name=t", "training.compile=false", "training.precision=fp32", "diffusion.batch_size=4"]


def trial(script: str, arguments: list[str], disturb: Callable[[], None] = lambda: None, kill_after: float = 0) -> dict:
    """Run a stage in a fork; `disturb` is called there first. Returns its exit code, its stderr and its seconds."""
    read, write = os.pipe()
    begin, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.setsid()
        os.close(read)
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = io.StringIO(), os.fdopen(2, "w", buffering=1)
        sys.argv = [f"{script}.py", *arguments]
        code = 0
        try:
            disturb()
            run_script(importlib.import_module(script).main)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            code = 1
        os._exit(code)
    os.close(write)
    deadline = begin + (kill_after or LIMIT)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    with os.fdopen(read, errors="replace") as said:
        stderr = said.read()
    return {"code": os.waitstatus_to_exitcode(status), "stderr": stderr, "seconds": time.monotonic() - begin}


def at_rename(number: int, after: bool) -> Callable[[], None]:
    """Kills the process at its n-th rename, before or after it."""
    def disturb() -> None:
        replace, calls = os.replace, []

        def killing(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args, **kwargs)
            if len(calls) == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = killing
    return disturb


def full_disk(number: int) -> Callable[[], None]:
    """From the n-th flush to the disk on there is no space."""
    def disturb() -> None:
        fsync, calls = os.fsync, []

        def full(descriptor):
            calls.append(1)
            if len(calls) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)
        os.fsync = full
    return disturb


def artifacts(output: Path, patterns: list[str]) -> dict[str, str]:
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
            for pattern in patterns for file in output.glob(pattern) if "rank" not in file.name}


def stage(name: str, base: Path, settings: list[str], kills: int) -> list[dict]:
    """All trials of one stage. `base` is an output folder in which the stages before it have run."""
    script, patterns, extra = STAGES[name]
    results = []

    def once(fault: str, disturb: Callable[[], None] = lambda: None, kill_after: float = 0.0) -> None:
        output = Path(tempfile.mkdtemp(dir=base.parent)) / "output"
        shutil.copytree(base, output, symlinks=True)
        arguments = [*settings, *extra, f"paths.output={output}"]
        disturbed = trial(script, arguments, disturb, kill_after)
        again = trial(script, arguments)
        found = artifacts(output, patterns)
        lines = [line for line in disturbed["stderr"].replace("\r", "\n").splitlines() if line.startswith("error: ")]
        results.append({
            "stage": name, "fault": fault, "lost": len(reference.keys() - found.keys()),
            "wrong": sum(found.get(file, digest) != digest for file, digest in reference.items()),
            "traceback": "Traceback" in disturbed["stderr"] + again["stderr"], "hang": again["seconds"] > LIMIT,
            "unsaid": fault == "full disk" and disturbed["code"] not in (0, 2) or (disturbed["code"] == 2 and len(lines) != 1),
            "again": again["code"], "parts": len(list(output.rglob("*.part")))})
        shutil.rmtree(output.parent)

    output = Path(tempfile.mkdtemp(dir=base.parent)) / "output"
    shutil.copytree(base, output, symlinks=True)
    whole = trial(script, [*settings, *extra, f"paths.output={output}"])
    reference = artifacts(output, patterns)
    assert whole["code"] == 0 and reference, (name, whole)
    for _ in range(kills):
        once("killed", kill_after=random.uniform(0.02, whole["seconds"]))
    for number in range(1, RENAMES + 1):
        once("killed before a rename", at_rename(number, after=False))
        once("killed after a rename", at_rename(number, after=True))
    for number in range(1, DISKS + 1):
        once("full disk", full_disk(number))
    shutil.copytree(output, base, dirs_exist_ok=True)  # what the next stages read
    shutil.rmtree(output.parent)
    return results


def table(results: list[dict]) -> str:
    lines = ["| stage | fault | times | lost | wrong | tracebacks | hangs | messages that are not one line |", "|---" * 8 + "|"]
    for key in dict.fromkeys((result["stage"], result["fault"]) for result in results):
        rows = [result for result in results if (result["stage"], result["fault"]) == key]
        counts = [sum(bool(row[column]) for row in rows) for column in ("lost", "wrong", "traceback", "hang", "unsaid")]
        lines.append("| " + " | ".join(map(str, (*key, len(rows), *counts))) + " |")
    return "\n".join(lines)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    torch.set_num_threads(1)
    random.seed(0)
    BACKBONES["iresnet18"], SIZES["tiny"] = TinyNet, TINY
    recogniser_training.HELD_OUT_PART, dynunc.WINDOW = 3, 3
    for script in ("train_autoencoder", "train_diffusion"):
        module = importlib.import_module(script)
        shrink(module)
    for script, *_ in STAGES.values():
        importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        settings, base, results = prepare(Path(folder)), Path(folder) / "base", []
        base.mkdir()
        for script, extra in (("create_sample_identity_contexts", []), ("create_negative_contexts", [])):
            assert trial(script, [*settings, *extra, f"paths.output={base}"])["code"] == 0, script
        for name in STAGES:
            begin = time.monotonic()
            if len(sys.argv) > 2 and name not in sys.argv[2:]:
                script, _, extra = STAGES[name]
                assert trial(script, [*settings, *extra, f"paths.output={base}"])["code"] == 0, name
                continue
            results += stage(name, base, settings, kills)
            print(f"{name}: {len(results)} trials so far, {time.monotonic() - begin:.0f} s", flush=True)
    print(table(results))
    bad = [row for row in results if any(row[column] for column in ("lost", "wrong", "traceback", "hang", "unsaid", "again"))]
    print(f"{len(results)} trials, {len(bad)} of them bad; part files left after the second run: "
          f"{sum(row['parts'] for row in results)}")
    for row in bad[:20]:
        print(json.dumps(row))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
