"""utils/diffusion/solvers.py: textbook solvers against diffusers in float64, published ones against golden trajectories."""
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

from models.unet import ConditionalUNet
from utils.diffusion.guidance import negative_guided, schedule
from utils.diffusion.solvers import linear_betas, published_timesteps, sample, timesteps

DATA = Path(__file__).parents[1] / "data"
SHAPE = (2, 3, 4, 4)


def toy_denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth function of x_t and t, so that every step matters."""
    return torch.tanh(x_t * (0.5 + t / 2000)) + 0.1 * torch.sin(x_t.roll(1, dims=-1) + t / 100)


def float64_scheduler(kind, **arguments):
    scheduler = kind(1000, trained_betas=linear_betas().numpy(), clip_sample=False, **arguments)
    scheduler.alphas_cumprod = torch.cumprod(1 - linear_betas().double(), dim=0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def test_timesteps_are_evenly_spaced():
    assert timesteps(1000, 200) == list(range(995, -1, -5))
    assert timesteps(1000, 1000) == list(range(999, -1, -1))
    for steps in (1, 3, 7, 150, 333, 999):
        run = timesteps(1000, steps)
        gaps = {a - b for a, b in zip(run, run[1:], strict=False)}
        assert len(run) == steps and run[-1] == 0 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_published_ddim_runs_167_steps_where_150_are_asked():
    assert len(published_timesteps(1000, 150)) == 167
    assert published_timesteps(1000, 200) == timesteps(1000, 200)


@pytest.mark.parametrize("steps", [1000, 50, 8])
def test_ddpm_equals_diffusers_in_float64(steps):
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours_noise = torch.Generator().manual_seed(2)
    ours = sample(toy_denoise, x_T, "ddpm", steps,
                  lambda t: torch.randn(SHAPE, dtype=torch.float64, generator=ours_noise))
    scheduler = float64_scheduler(DDPMScheduler, variance_type="fixed_large", timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    x_t, noise = x_T, torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        x_t = scheduler.step(toy_denoise(x_t, int(t)), int(t), x_t, generator=noise).prev_sample
    assert (ours - x_t).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [1000, 200, 10])
def test_ddim_equals_diffusers_in_float64(steps):
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = sample(toy_denoise, x_T, "ddim", steps, noise=None)
    scheduler = float64_scheduler(DDIMScheduler, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.final_alpha_cumprod = scheduler.one
    scheduler.set_timesteps(steps)
    x_t = x_T
    for t in scheduler.timesteps:
        x_t = scheduler.step(toy_denoise(x_t, int(t)), int(t), x_t).prev_sample
    assert (ours - x_t).abs().max() < 1e-9


def test_dpm_solver_converges_to_fine_ddim():
    """Both solve the same ODE: 40 steps of the second-order solver come nearer to 1,000 DDIM steps than 40 of DDIM."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    fine = sample(toy_denoise, x_T, "ddim", 1000, noise=None)
    coarse = sample(toy_denoise, x_T, "ddim", 40, noise=None)
    second_order = sample(toy_denoise, x_T, "dpm++", 40, noise=None)
    assert (second_order - fine).abs().mean() < 0.5 * (coarse - fine).abs().mean()
    assert second_order.dtype == torch.float32


@pytest.mark.parametrize("solver, steps, as_published", [
    ("euler", 10, False), ("ddpm", 0, False), ("ddpm", 1001, False), ("ddpm", 500, True), ("dpm++", 20, True)])
def test_the_impossible_is_refused(solver, steps, as_published):
    with pytest.raises(ValueError):
        sample(toy_denoise, torch.zeros(SHAPE), solver, steps, noise=None, as_published=as_published)


# ---- golden trajectories: the published implementation, the same network, the same noise --------------------------------

@pytest.fixture(scope="module")
def golden():
    torch.manual_seed(0)
    unet = ConditionalUNet(**json.loads((DATA / "configs.json").read_text())["unet_small"]).eval()
    unet.load_state_dict(load_file(DATA / "unet_small.safetensors"))
    return unet, load_file(DATA / "trajectories.safetensors")


def test_the_schedule_equals_the_published_one(golden):
    assert torch.equal(linear_betas(), golden[1]["betas"])


@pytest.mark.parametrize("w, name, key", [
    (0.0, "constant", "baseline"), (0.5, "constant", "w05"), (1.0, "linear", "w10_adaptive"),
    (1.0, "reverse", "w10_reverse")])
@pytest.mark.parametrize("solver, steps, prefix", [("ddpm", 1000, "ddpm"), ("ddim", 200, "ddim200")])
def test_golden_trajectories(golden, solver, steps, prefix, w, name, key):
    unet, values = golden
    generator = torch.Generator().manual_seed(7)
    x_T = torch.randn(2, 3, 8, 8, generator=generator)
    assert torch.equal(x_T, values["noise_prior"])
    with torch.inference_mode():
        tokens = unet.context_tokens(torch.cat([values["context"], values["negative_context"]]))
        denoise = negative_guided(
            lambda x_t, t: unet(x_t, torch.full((2,), t), tokens[:2]),
            lambda x_t, t: unet(x_t, torch.full((2,), t), tokens).chunk(2),
            schedule(name, w, 1000))
        x_0 = sample(denoise, x_T, solver, steps, lambda t: torch.randn(2, 3, 8, 8, generator=generator),
                     as_published=True)
    assert (x_0 - values[f"{prefix}_{key}"]).abs().max() < 2e-3
