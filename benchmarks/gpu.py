"""Every figure that waits for a GPU, in 25 minutes at most on one, written to docs/gpu.md.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --rehearse output/rehearsal      # on the CPU with tiny sizes: only whether everything runs

Each part is a command of its own, with a time limit; what it printed is kept in docs/gpu.json as soon as it ends. Running
again makes the parts that are missing or failed; delete a part there to measure it anew.
"""
import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.sampling import name_of
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import read_json, write_json, write_text
from utils.runtime.records import versions

DOCS = Path(__file__).parents[1] / "docs"
IMAGES, STEPS = 10_050 * 50, (1000, 200, 20)  # the paper's set; of DDPM, of the ablation's DDIM, of DPM-Solver++


@dataclass(frozen=True)
class Part:
    """A command, its size for a rehearsal, and what is said of it."""

    title: str
    command: str
    tiny: str
    minutes: float
    about: str


PARTS = {
    "sampling": Part(
        "Sampling, full size: the published algorithm beside ours", "benchmarks.sampling --steps 20",
        "benchmarks.sampling --steps 1 --batch 2 --size small", 4,
        "Matrix rate: large matrix products of that type on this device, measured in the same run. The share of it is the model "
        "FLOPs utilisation (MFU) against what can be had here; in fp32 convolutions may use TF32, which passes the fp32 rate."),
    "parity": Part(
        "The same images as the CPU's?", "benchmarks.parity", "benchmarks.parity --images 2 --steps 2", 3,
        "The included generator; the first row is what sampling.precision=fp32 gives on this device."),
    "training": Part(
        "Training the recogniser", "benchmarks.training", "benchmarks.training --backbone mobilefacenet --batch 2 --steps 1 "
        "--images 8 --no-compile", 6, "From packed faces to the optimiser's step; goal on one H200: 8,000 images/s."),
    "embedding": Part(
        "Embedding", "benchmarks.embedding", "benchmarks.embedding --faces 4 --backbones iresnet100", 2,
        "Without reading files."),
    "negatives": Part(
        "Choosing negatives", "benchmarks.negatives 10050", "benchmarks.negatives 50", 2, "On this machine's CPU."),
    "demo": Part(
        "The demo, `make demo`", "experiments.demo paths.run=gpu", "experiments.demo paths.run=gpu sampling.identities=8 "
        "sampling.images_per_identity=3 sampling.steps=6 fr.backbone=mobilefacenet fr.images_per_identity=3 fr.batch_size=8 "
        "fr.epochs=1 sampling.precision=fp32", 8, "Every stage, from contexts to a recogniser; its table of scores."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="tiny sizes on the CPU, written there")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        raise UserError(f"--parts: {min(unknown)} is unknown; the parts are {', '.join(PARTS)}")
    rehearse, folder = arguments.rehearse is not None, arguments.rehearse or DOCS
    if not (rehearse or torch.cuda.is_available()):
        raise UserError("benchmarks.gpu: this machine has no usable GPU; run it on one that has, or with --rehearse FOLDER")
    device = distributed.setup("cpu" if rehearse else "cuda").device
    machine = {"device": name_of(device), "host": f"{platform.machine()}, {torch.get_num_threads()} threads",
               "versions": versions() | {"cuda": torch.version.cuda or "none"}}

    kept = read_json(folder / "gpu.json") if (folder / "gpu.json").is_file() else {}
    if kept and kept["machine"] != machine:
        raise UserError(f"{folder / 'gpu.json'}: is of {kept['machine']['device']} and its versions, not of this machine; "
                        "move it and gpu.md elsewhere")
    done = kept.get("parts", {})
    for name, part in PARTS.items():
        if name in arguments.parts.split(",") and done.get(name, {}).get("code") != 0:
            with tempfile.TemporaryDirectory() as output:  # a demo that went on from an earlier one would be no measurement
                done[name] = run_part(part, device, output, rehearse)
            write_json(folder / "gpu.json", {"machine": machine, "parts": done})
            write_text(folder / "gpu.md", page(machine, done, rehearse))
    failed = [name for name in done if done[name]["code"] != 0]
    print(f"{folder / 'gpu.md'}: {len(done) - len(failed)} of {len(PARTS)} parts"
          + (f"; failed, and made again by the same command: {', '.join(failed)}" if failed else ""))


def run_part(part: Part, device: torch.device, output: str, rehearse: bool) -> dict[str, Any]:
    """Run a part's command: what it printed, its exit code (124: it took too long) and seconds."""
    command = (part.tiny if rehearse else part.command).split()
    if command[0] == "experiments.demo":
        command += [f"device={device.type}", f"paths.output={output}"]
    elif command[0] != "benchmarks.negatives":
        command += ["--device", device.type]
    print(f"$ python -m {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        ended = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, timeout=60 * part.minutes)
        code, printed = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as error:
        code, printed = 124, (error.stdout or b"").decode(errors="replace")
    return {"command": f"python -m {' '.join(command)}", "code": code, "seconds": round(time.monotonic() - begin, 1),
            "printed": printed.splitlines()}


def page(machine: Mapping[str, Any], done: Mapping[str, Any], rehearse: bool) -> str:
    """docs/gpu.md."""
    text = ["# Figures on a GPU", "", "    python -m benchmarks.gpu", "",
            "Written by that command, part by part; 25 minutes at most. A part that is missing is not measured yet.", "",
            f"{machine['device']}; {machine['host']}; "
            + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + ".", ""]
    if rehearse:
        text[4:4] = ["**A rehearsal on a CPU with tiny sizes: no figure here means anything.**", ""]
    for name, part in PARTS.items():
        text += [f"## {part.title}", ""]
        if name not in done:
            text += ["Not measured yet.", ""]
            continue
        made = done[name]
        text += [f"    {made['command']}", "", f"{part.about} {made['seconds']:.0f} s.", ""]
        if made["code"]:
            took = f"did not end in {part.minutes:g} minutes" if made["code"] == 124 else f"failed with exit code {made['code']}"
            text += [f"**The command {took}**; what it printed before:", ""]
        text += [*tables(made["printed"]), ""]
        if name == "sampling" and not made["code"]:
            text += arithmetic(made["printed"])
    return "\n".join(text).rstrip() + "\n"


def tables(printed: list[str]) -> list[str]:
    """The tables of what a part printed, and the line before each."""
    lines: list[str] = []
    for before, line in zip(["", *printed], printed, strict=False):
        if line.startswith("|"):
            lines += [] if before.startswith("|") else ["", before, ""] if before.strip() else [""]
            lines.append(line)
    return lines[1:]


def arithmetic(printed: list[str]) -> list[str]:
    """What the measured rate makes for the paper's set; nothing of it is measured."""
    rate = {name: float(found[1]) * 200 for name in ("published, fp32", "ours, bf16") for line in printed
            if (found := re.match(rf"\| {name} \|[^|]*\|[^|]*\| ([\d.e-]+) \|", line))}
    text = [f"**Arithmetic, not measured**: hours of denoising for the paper's {IMAGES:,} images, {IMAGES:,} x steps / "
            "(images x steps a second of one GPU x GPUs x 3,600).", "",
            "| | steps | 1 GPU | 8 GPUs | 64 GPUs |", "|---|---|---|---|---|"]
    for name, per_second in rate.items():
        for steps in STEPS:
            hours = IMAGES * steps / per_second / 3600
            text.append(f"| {name} | {steps:,} | {hours:,.1f} | {hours / 8:,.1f} | {hours / 64:,.2f} |")
    return [*text, ""]


if __name__ == "__main__":
    run_script(main)
