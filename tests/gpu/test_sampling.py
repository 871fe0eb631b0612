"""The whole of sampling on a GPU that is not there: every solver, rule and schedule, in both precisions."""
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import create_negative_contexts
import create_sample_identity_contexts
import sample
from models import random_weights
from models.autoencoder import Autoencoder
from models.schedule import linear_betas
from models.sizes import COMMON
from models.unet import ConditionalUNet
from tests.gpu.fake import CUDA, FakeGPU, fake_gpu
from tests.running import run
from tests.tiny_generator import TINY
from utils.diffusion.fitted import FITTED
from utils.diffusion.guidance import RULES, SCHEDULES, guided
from utils.diffusion.latent_diffusion import LatentDiffusion
from utils.diffusion.noise import gaussian
from utils.diffusion.solvers import PUBLISHED, SOLVERS

B, SHAPE, WIDTH = 3, (4, 8, 8), 16
STEPS = 5, 6  # what is copied to the device must not depend on them
COPIES = 3  # contexts, negatives, and a zero of VQModel's


class OneLayer(nn.Module):
    """As quick a network as there is: the operations of a whole one take seconds here, and are tried once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.embedding = nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1), nn.Linear(WIDTH, SHAPE[0])

    def context_tokens(self, contexts: torch.Tensor) -> torch.Tensor:
        return self.embedding(contexts)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x_t = torch.cat([x_t] * (len(tokens) // len(x_t)))
        return self.layer(x_t) + tokens[:, :, None, None] * t.to(x_t.dtype).mean()


def generator(unet: nn.Module, bf16: bool, prediction: str = "eps") -> LatentDiffusion:
    autoencoder = Autoencoder(**TINY["first_stage"])
    return LatentDiffusion(unet.eval().requires_grad_(False), autoencoder.requires_grad_(False), linear_betas(), SHAPE,
                           prediction, CUDA, bf16)


def draw(gpu: FakeGPU, model: LatentDiffusion, guide, solver: str, steps: int, as_published: bool = False) -> int:
    """Draw images as sample.py does; nothing may be copied to the host. How many copies go to the device."""
    contexts = torch.randn(B, WIDTH)
    images = (torch.tensor(numbers, device=CUDA) for numbers in ([5, 5, 6], [0, 1, 0]))
    noise = partial(gaussian, 42, *images, shape=SHAPE, device=CUDA)
    before = gpu.to_device
    drawn = model.images(contexts, -contexts, noise, guide, solver, steps, as_published)
    assert drawn.shape == (B, 3, 32, 32) and drawn.dtype == torch.float32 and drawn.device == CUDA
    return gpu.to_device - before


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_network_and_the_first_stage(bf16):
    unet = ConditionalUNet(**COMMON | TINY["unet"] | {"input_channels": SHAPE[0], "context_input_channels": WIDTH})
    with fake_gpu() as gpu, torch.inference_mode():
        assert draw(gpu, generator(unet, bf16), guided("negative", 0.5), "ddim", 1) == COPIES
    assert {kind for _, kind in gpu.types} == {torch.bfloat16 if bf16 else torch.float32} and gpu.types.total() > 100


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_and_rule(solver, bf16, monkeypatch):
    for steps in STEPS:  # some numbers for the fitted one
        monkeypatch.setitem(FITTED, steps, tuple((999 - 150 * k, 0.5, *[0.1] * (k + 1)) for k in range(steps)))
    with fake_gpu() as gpu, torch.inference_mode():
        model = generator(OneLayer(), bf16)
        for rule in RULES:
            copies = [draw(gpu, model, guided(rule, 0.5), solver, steps) for steps in STEPS]
            assert copies == [COPIES, COPIES], f"{rule}: copies to the device at every step"
    assert {kind for _, kind in gpu.types} == {torch.bfloat16 if bf16 else torch.float32}


def test_every_schedule_and_a_w_for_each_image():
    with fake_gpu() as gpu, torch.inference_mode():
        model = generator(OneLayer(), bf16=True, prediction="v")
        w = torch.tensor([0.0, 0.5, 1.0], device=CUDA).view(B, 1, 1, 1)
        for rule in RULES:
            for schedule in SCHEDULES:
                assert draw(gpu, model, guided(rule, w, schedule, (200, 700)), "ddim", STEPS[0]) == COPIES


@pytest.mark.parametrize("solver", PUBLISHED)
def test_the_published_solvers(solver):
    with fake_gpu() as gpu, torch.inference_mode():
        model = generator(OneLayer(), bf16=False)
        model.betas = linear_betas(8)  # the published DDPM runs all of them
        assert draw(gpu, model, guided("negative", 0.5), solver, 8, as_published=True) == COPIES


def test_reads_of_values_are_found():
    """The rehearsal itself: what would wait for a GPU raises."""
    with fake_gpu() as gpu:
        x = torch.ones(3, device=CUDA)
        for read in (lambda: x.cpu(), lambda: x.tolist(), lambda: bool(x.sum() > 2), lambda: x[x > 0], lambda: x.numpy(),
                     lambda: torch.zeros(3).copy_(x), lambda: x.to("cpu", torch.float64), lambda: float(x[0])):
            with pytest.raises(Exception):  # noqa: B017
                read()
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(3)
        assert (x + torch.tensor(1.0)).device == CUDA and gpu.to_host == 0
        gpu.may_leave = True
        assert x.cpu().tolist() == [1, 1, 1] and gpu.to_host == 1


@pytest.mark.parametrize("variety", [[], ["variety.cone=0.7", "variety.w=uniform", "variety.annealing=0.1"]],
                         ids=["plain", "varied"])
def test_sample_py(tmp_path, monkeypatch, variety):
    """From weights to PNG files: a batch leaves the device as its pixels, and a flag that all of them are finite."""
    random_weights.write(tmp_path / "tiny", "small", seed=0)
    settings = [f"paths.output={tmp_path}", "paths.run=gpu", "contexts.source=uniform", "contexts.dimension=512",
                "contexts.number=4", f"model.diffusion={tmp_path / 'tiny'}", "sampling.identities=3",
                f"model.first_stage_encoder={tmp_path / 'tiny' / 'first_stage_encoder_state_dict.pt'}",
                f"model.first_stage_decoder={tmp_path / 'tiny' / 'first_stage_decoder_state_dict.pt'}",
                "sampling.solver=dpm++", "sampling.steps=2", "sampling.images_per_identity=3", "sampling.batch_size=4", *variety]
    for script in (create_sample_identity_contexts, create_negative_contexts):
        run(script, *settings, "device=cpu")
    images = LatentDiffusion.images
    with fake_gpu() as gpu:
        def drawn(*arguments) -> torch.Tensor:
            gpu.may_leave, before = False, gpu.to_device
            result = images(*arguments)
            assert gpu.to_device - before == COPIES
            gpu.may_leave = True
            return result
        monkeypatch.setattr(LatentDiffusion, "images", drawn)
        run(sample, *settings, "device=cuda")
        assert gpu.to_host == 2 * 3  # three batches
        assert {kind for _, kind in gpu.types} == {torch.bfloat16}  # the GPU is fast at it
    files = sorted(Path(tmp_path / "gpu" / "samples").glob("*/*.png"))
    assert len(files) == 9 and np.asarray(Image.open(files[0])).shape == (64, 64, 3)
