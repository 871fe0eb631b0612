"""One step and more of each training, as the scripts make it, on a GPU that is not there.

Forward passes, types and copies on the fake GPU, whose backward pass cannot run; backward passes, clipping and optimisers on
torch's device `meta`, which has no values either. What the host may wait for between steps is taken out: the check of
finiteness, rows of the log, validations and saving.
"""
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_autoencoder
import train_diffusion
import train_fr
from models.backbones import BACKBONES
from models.margin_heads import HEADS
from models.sizes import SIZES
from tests.gpu.fake import CUDA, FakeGPU, fake_gpu
from tests.running import run
from tests.tiny_generator import TINY, shrink
from tests.tiny_training import TinyNet
from utils.recognition import recogniser_training
from utils.runtime import ranks
from utils.runtime.ranks import Ranks
from utils.training.loop import CHECK_STEPS, Training

pytestmark = pytest.mark.slow
META = torch.device("meta")
PEOPLE, IMAGES, STEPS = 8, 2, 4
NUMBERS = count()


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum()


class Done(BaseException):
    """The training has run; what comes after it reads values."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """Faces, and an output folder in which everything that is computed once of them is there."""
    folder, output = tmp_path_factory.mktemp("faces"), tmp_path_factory.mktemp("output")
    generator = np.random.default_rng(0)
    for i in range(PEOPLE):
        (folder / str(i)).mkdir()
        for k in range(IMAGES):
            image = np.kron(generator.integers(0, 256, (7, 7, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
            Image.fromarray(image).save(folder / str(i) / f"{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        for script in (train_autoencoder, train_diffusion, train_fr):
            train(script, patch, folder, output, "device=cpu", "training.name=made", "fr.name=made")
    return folder, output


def train(script, patch, faces: Path, output: Path, *settings: str) -> None:
    patch.setitem(SIZES, "tiny", TINY)
    patch.setitem(BACKBONES, "iresnet18", TinyNet)
    patch.setattr(recogniser_training, "HELD_OUT_PART", 2)
    if script is not train_fr:
        shrink(script, patch.setattr)
    stage = output / "training" / "made" / "first_stage_{}.safetensors"
    run(script, f"training.faces={faces}", f"paths.output={output}", "training.crop=whole", "training.size=tiny",
        "training.compile=false", f"training.length={STEPS}steps", f"contexts.recogniser={__file__}", "diffusion.batch_size=4",
        f"model.first_stage_encoder={str(stage).format('encoder')}", f"model.first_stage_decoder={str(stage).format('decoder')}",
        f"fr.images={faces}", "paths.run=run", "fr.backbone=iresnet18", "fr.batch_size=4", "fr.epochs=2", *settings)


def on_device(script, patch, made: tuple[Path, Path], device: torch.device, runs: int, *settings: str,
              gpu: FakeGPU | None = None, blocking: int = 0) -> list[Training]:
    """Run a script's training runs on a device without values; `blocking` copies of a step may block."""
    run_whole, trained = Training.run, []

    def run_training(training: Training, *arguments, **named) -> None:
        copies, steps = gpu and gpu.blocking, training.step
        run_whole(training, *arguments, **named)
        assert not gpu or gpu.blocking - copies == blocking * (training.step - steps), "a copy waits for the step before"
        trained.append(training)
        if len(trained) == runs:
            raise Done

    patch.setattr(ranks, "setup", lambda device_setting: Ranks(0, 1, device))
    for name, instead in {"run": run_training, "save": lambda *_: None, "_report": lambda self, *_: self.log.append({}),
                          "_validate": lambda *_: {}, "_announce": lambda *_: None,
                          "_check_finite": lambda *_, **__: 0.0}.items():
        patch.setattr(Training, name, instead)
    if script is train_autoencoder:
        patch.setattr(script, "quantise", lambda *_: None)  # k-means, on the host
    with pytest.raises(Done):
        name = f"{device.type}{next(NUMBERS)}"
        train(script, patch, *made, f"training.name={name}", f"fr.name={name}", *settings)
    return trained


RECOGNISER = "fr.augmentation=randaugment", "fr.is_original_train=true"
SCRIPTS = {"autoencoder": (train_autoencoder, 2, ()), "generator": (train_diffusion, 1, ()),
           "generator as published": (train_diffusion, 1, ("extras.use=", "extras.identity=0")),
           **{f"recogniser, {head}": (train_fr, 1, (f"fr.head={head}", *RECOGNISER)) for head in HEADS}}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "generator" else name for name in SCRIPTS]


@pytest.mark.parametrize("name", NAMES)
def test_updates_read_no_value(made, monkeypatch, name):
    """Losses, gradients, clipping, optimisers, averaged weights and the log's sums: a read of a value raises."""
    script, runs, settings = SCRIPTS[name]
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *types, **named: nullcontext() if kind == "meta" else
                        autocast(kind, *types, **named))
    updates, update = [], Training._update

    def counted(training: Training, *arguments) -> None:
        update(training, *arguments)
        updates.append({weight.grad.device.type for group in training.optimizer.param_groups for weight in group["params"]
                        if weight.requires_grad})

    monkeypatch.setattr(Training, "_update", counted)
    trained = on_device(script, monkeypatch, made, META, runs, *settings, "training.precision=fp32")
    assert len(updates) >= 2 and all(devices == {"meta"} for devices in updates)
    assert all(training.totals.is_meta and training.finite.is_meta for training in trained)


@pytest.mark.parametrize("name", NAMES)
def test_losses_in_bf16_on_the_device(made, monkeypatch, name):
    """The same up to the loss, with the types and copies of a GPU: bfloat16 comes out of autocast, the loss is float32.

    Two things are known to wait for the device: a zero that diffusers' VQModel copies there when it decodes, and the matrices
    of torchvision's rotations and shifts, which is why RandAugment is left out here.
    """
    script, runs, settings = SCRIPTS[name]
    losses = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros((), device=CUDA))
    with fake_gpu() as gpu:
        on_device(script, monkeypatch, made, CUDA, runs, *settings, "fr.augmentation=flip", gpu=gpu,
                  blocking=int(name in ("autoencoder", "generator")))
    assert len(losses) >= 2 and {(loss.dtype, loss.device) for loss in losses} == {(torch.float32, CUDA)}
    assert {kind for operation, kind in gpu.types if operation == "convolution"} == {torch.bfloat16}


def test_the_loop_waits_for_the_device_once_in_so_many_steps(made, monkeypatch, tmp_path):
    """The reads that the tests above leave out, counted: a training run of 120 steps with no row or validation before its end."""
    network, reads = nn.Linear(2, 1), []
    monkeypatch.setattr(Ranks, "sum", lambda self, values: reads.append(training.step) or values.tolist())
    training = Training("t", tmp_path / "state.pt", tmp_path / "log.csv", Ranks(0, 1, torch.device("cpu")),
                        train_fr.Budget(steps=120), torch.optim.SGD(network.parameters(), 0.1), {"network": network},
                        clip=[(network, 1.0)], images=1, rows=1)

    training.run(lambda step: iter(lambda: (torch.ones(2),), None), nn.Sequential(network, Sum()), lambda: {"score": 0.0}, 1)
    assert CHECK_STEPS == 50 and reads == [50, 100, 120, 120, 120]  # at the end: before the validation, the row and the save
