"""utils/diffusion/solvers.py: textbook solvers against diffusers in float64, published ones against golden trajectories."""
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

from models.schedule import alpha_bars, linear_betas
from models.unet import ConditionalUNet
from utils.diffusion.fitted import FITTED, WEIGHTS
from utils.diffusion.guidance import guided
from utils.diffusion.latent_diffusion import LatentDiffusion
from utils.diffusion.noise import gaussian
from utils.diffusion.solvers import PUBLISHED, SOLVERS, check, fitted, sample
from utils.diffusion.spacings import karras, linspace, log_snr, timesteps
from utils.runtime.errors import UserError
from utils.runtime.files import file_digest

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


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "log_snr"])
def test_the_last_step_of_ddpm_draws_no_noise(spacing):
    """Some spacings end above t = 0; what comes out is the x_0 that is predicted there, for any of them."""
    chosen, seen, called = timesteps(spacing, "ddpm", 20, linear_betas()), [], []

    def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
        called.append((x_t, t))
        return toy_denoise(x_t, t)

    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = sample(denoise, x_T, "ddpm", chosen, lambda t: seen.append(t) or torch.ones(SHAPE, dtype=torch.float64))
    assert seen == chosen[:-1]
    (x_t, t), alpha_bar = called[-1], torch.cumprod(1 - linear_betas().double(), dim=0)[chosen[-1]]
    torch.testing.assert_close(out, (x_t - (1 - alpha_bar).sqrt() * toy_denoise(x_t, t)) / alpha_bar.sqrt(), rtol=0, atol=1e-9)


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


def with_float64_sigmas(kind, timesteps: list[int], **arguments):
    """A scheduler of diffusers that runs these timesteps in float64, down to sigma = 0."""
    scheduler = kind(1000, trained_betas=linear_betas().numpy(), **arguments)
    scheduler.set_timesteps(len(timesteps))
    alpha_bars = torch.cumprod(1 - linear_betas().double(), dim=0)[timesteps]
    scheduler.timesteps = torch.tensor(timesteps)
    scheduler.sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return scheduler


def trajectory(solver: str, timesteps: list[int], x_T: torch.Tensor, noise=None) -> list[torch.Tensor]:
    """Each x_t at which a solver asks for a prediction, and x_0."""
    seen = []
    x_0 = sample(lambda x_t, t: seen.append(x_t) or toy_denoise(x_t, t), x_T, solver, timesteps, noise)
    return [*seen, x_0]


RUNS = {"linspace": linspace(12, alpha_bars(linear_betas())), "log_snr": log_snr(9, alpha_bars(linear_betas())),
        "one": [999], "two": [999, 400], "uneven": [990, 700, 650, 300, 20, 3], "twenty": karras(20, alpha_bars(linear_betas()))}


def walked_beside(solver: str, scheduler, run: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our x_0, and the x before the last step and after it of diffusers' scheduler; all x before are the same in both."""
    x_t = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = trajectory(solver, RUNS[run], x_t)
    for t, of_ours in zip(scheduler.timesteps, ours, strict=False):
        assert (of_ours - x_t).abs().max() < 1e-9
        last, x_t = x_t, scheduler.step(toy_denoise(x_t, int(t)), t, x_t).prev_sample
    return ours[-1], last, x_t


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("solver, order", [("unipc", 2), ("unipc3", 3)])
def test_unipc_equals_diffusers_in_float64(solver, order, run):
    ours, _, x_0 = walked_beside(solver, with_float64_sigmas(UniPCMultistepScheduler, RUNS[run], solver_order=order), run)
    assert (ours - x_0).abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore")  # diffusers' log of 0 and its NumPy calls
@pytest.mark.parametrize("solver, order, run", [("deis", 2, run) for run in RUNS] + [
    ("deis3", 3, run) for run in RUNS if run != "twenty"])  # with 15 steps or more diffusers ends at order 3, ours at 2
def test_deis_equals_diffusers_in_float64_to_the_last_prediction(solver, order, run):
    """The last step leads to x_0 here, in diffusers to alpha_bar of timestep 0."""
    ours, last, _ = walked_beside(solver, with_float64_sigmas(DEISMultistepScheduler, RUNS[run], solver_order=order), run)
    alpha_bar = torch.cumprod(1 - linear_betas().double(), dim=0)[RUNS[run][-1]]
    x_0 = (last - (1 - alpha_bar).sqrt() * toy_denoise(last, RUNS[run][-1])) / alpha_bar.sqrt()
    assert (ours - x_0).abs().max() < 1e-9


@pytest.mark.parametrize("run", RUNS)
def test_sde_dpm_solver_equals_diffusers(run):
    """To float32's rounding, which diffusers does to each x_t."""
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def noise(t: int) -> torch.Tensor:
        return gaussian(3, 0, 0, t, SHAPE).double()

    ours = trajectory("dpm++sde", RUNS[run], x_T, noise)
    scheduler = with_float64_sigmas(DPMSolverMultistepScheduler, RUNS[run], algorithm_type="sde-dpmsolver++")
    x_t = x_T
    for t, of_ours in zip(scheduler.timesteps, ours, strict=False):
        assert (of_ours - x_t).abs().max() < 1e-6 * of_ours.abs().max()
        x_t = scheduler.step(toy_denoise(x_t, int(t)), t, x_t, variance_noise=noise(int(t))).prev_sample
    assert (ours[-1] - x_t).abs().max() < 1e-6 * ours[-1].abs().max()


def test_the_sde_has_the_variance_of_the_prior():
    """With eps = x_t sigma, whose x_0 is distributed as x_T is, every x_t stays standard normal."""
    levels = alpha_bars(linear_betas())
    numbers = iter(range(10**6))

    def noise(t: int) -> torch.Tensor:
        return gaussian(0, 0, next(numbers), t, (4, 100, 100)).double()

    x_0 = sample(lambda x_t, t: x_t * (1 - levels[t]) ** 0.5, noise(1000), "dpm++sde", 60, noise)
    assert x_0.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("solver", ["dpm++", "unipc", "unipc3", "deis", "deis3"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "log_snr"])
def test_a_spacing_is_that_of_the_timesteps_run(solver, spacing):
    run = timesteps(spacing, solver, 9, linear_betas())
    asked = []
    sample(lambda x_t, t: asked.append(t) or x_t / 2, torch.ones(SHAPE), solver, run, noise=None)
    assert asked == run


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "fitted"])
def test_a_number_of_steps_is_the_default_spacing(solver):
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    by_number, by_list = (sample(toy_denoise, x_T, solver, steps, lambda t: gaussian(1, 0, 0, t, SHAPE))
                          for steps in (12, timesteps("default", solver, 12, linear_betas())))
    assert torch.equal(by_number, by_list)


def test_dpm_solver_has_the_bytes_of_diffusers_own_timesteps():
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    for steps in (1, 6, 15, 50):
        scheduler = DPMSolverMultistepScheduler(1000, trained_betas=linear_betas().numpy())
        scheduler.set_timesteps(steps)
        x_t = x_T
        for t in scheduler.timesteps:
            x_t = scheduler.step(toy_denoise(x_t, int(t)), t, x_t).prev_sample
        assert torch.equal(sample(toy_denoise, x_T, "dpm++", steps, noise=None), x_t)


# ---- the fitted one ---------------------------------------------------------------------------------------------------

def ddim_weights(timesteps: list[int]) -> list[tuple[float, ...]]:
    """DDIM as a weighted sum: x_next = sigma'/sigma x_t + (alpha' - alpha sigma'/sigma) x_0."""
    levels, rows = alpha_bars(linear_betas()), []
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar, next_one = levels[t], 1.0 if t_next is None else levels[t_next]
        a = ((1 - next_one) / (1 - alpha_bar)) ** 0.5
        rows.append((t, a, next_one**0.5 - a * alpha_bar**0.5, 0.0))
    return rows


def test_a_fitted_step_is_a_weighted_sum():
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run = timesteps("linspace", "ddim", 7, linear_betas())
    drawn = fitted(toy_denoise, x_T, run, None, linear_betas(), ddim_weights(run))
    assert (drawn - sample(toy_denoise, x_T, "ddim", run, None)).abs().max() < 1e-9


def test_a_fitted_step_weighs_the_latest_prediction_first():
    """Predictions of x_0 of 1, 2 and 3: 10 x 3 + 100 x 2 + 1000 x 1, whatever x_t."""
    predicted = iter((1.0, 2.0, 3.0))
    levels = alpha_bars(linear_betas())

    def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return (x_t - levels[t] ** 0.5 * next(predicted)) / (1 - levels[t]) ** 0.5

    numbers = [(999, 0.5, 1.0), (500, 0.25, 0.0, 1.0), (10, 0.0, 10.0, 100.0, 1000.0)]
    x_0 = fitted(denoise, torch.ones(SHAPE, dtype=torch.float64), [999, 500, 10], None, linear_betas(), numbers)
    assert x_0.flatten().tolist() == pytest.approx([1230.0] * x_0.numel())


def test_the_numbers_are_those_of_the_embedded_weights():
    assert WEIGHTS == file_digest(Path("models/demo/checkpoints/ema_averaged_model.safetensors"))


@pytest.mark.parametrize("steps", FITTED)
def test_what_was_fitted_runs_in_its_timesteps(steps):
    run = timesteps("default", "fitted", steps, linear_betas())
    assert len(run) == steps and run == sorted(set(run), reverse=True) and 0 <= run[-1] and run[0] <= 999
    check("fitted", steps, False, 1000)


@pytest.mark.parametrize("steps, T, spacing", [(7, 1000, "default"), (8, 1000, "trailing"), (8, 500, "default")])
def test_the_fitted_one_is_refused_where_it_was_not_fitted(steps, T, spacing):
    with pytest.raises(UserError, match="sampling.solver: fitted was fitted to the embedded .* as sampling.solver=dpm[+][+]$"):
        check("fitted", steps, False, T, spacing)


@pytest.mark.parametrize("solver", ["unipc", "unipc3", "deis", "deis3"])
def test_higher_orders_come_nearer_to_fine_ddim(solver):
    x_T = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fine, coarse = (sample(toy_denoise, x_T, "ddim", steps, noise=None) for steps in (1000, 40))
    assert (sample(toy_denoise, x_T, solver, 40, None) - fine).abs().mean() < 0.5 * (coarse - fine).abs().mean()


def test_dpm_solver_converges_to_fine_ddim():
    """Both solve the same ODE: 40 steps of the second-order solver come nearer to 1,000 DDIM steps than 40 of DDIM."""
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    fine = sample(toy_denoise, x_T, "ddim", 1000, noise=None)
    coarse = sample(toy_denoise, x_T, "ddim", 40, noise=None)
    second_order = sample(toy_denoise, x_T, "dpm++", 40, noise=None)
    assert (second_order - fine).abs().mean() < 0.5 * (coarse - fine).abs().mean()
    assert second_order.dtype == torch.float32


@pytest.mark.parametrize("solver, steps, as_published, words", [
    ("euler", 10, False, "solver 'euler' is unknown; there are ddpm, ddim, dpm"),
    ("ddpm", 0, False, "steps must lie in 1 .. T = 1000, not 0"),
    ("ddpm", 1001, False, "steps must lie in 1 .. T = 1000, not 1001"),
    ("ddpm", 500, True, "the published DDPM runs all 1000 steps, not 500"),
    ("dpm++", 20, True, "solver 'dpm[+][+]' as published is unknown; there are ddpm, ddim")])
def test_the_impossible_is_refused(solver, steps, as_published, words):
    with pytest.raises(ValueError, match=words):
        sample(toy_denoise, torch.zeros(SHAPE), solver, steps, noise=None, as_published=as_published)


@pytest.mark.parametrize("solver, steps, as_published, words", [
    ("dpm++", 20, True, "sampling.as_published: true is impossible with sampling.solver=dpm[+][+], .* to ddpm or ddim"),
    ("ddpm", 50, True, "sampling.steps: ddpm does not run in 50 steps .* sampling.steps=1000, or sampling.as_published=false"),
    ("dpm++", 1000, False, "sampling.steps: dpm[+][+] does not run in 1000 steps of T = 1000: .*; set fewer, at most 999"),
    ("ddim", 1001, False, "sampling.steps: ddim does not run in 1001 steps of T = 1000: steps must lie in 1 .. T")])
def test_what_a_solver_cannot_run_is_refused(solver, steps, as_published, words):
    with pytest.raises(UserError, match=words) as refusal:
        check(solver, steps, as_published, 1000)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "fitted"])
@pytest.mark.parametrize("steps", [1, 2, 3, 15, 50, 333, 997, 999])
def test_what_a_solver_can_run_passes(solver, steps):
    check(solver, steps, False, 1000)


def test_what_was_published_passes():
    check("ddpm", 1000, True, 1000)
    check("ddim", 150, True, 1000)
    check("ddpm", 500, True, 500)


def test_the_published_solvers_are_among_the_solvers():
    assert type(SOLVERS) is dict and list(SOLVERS)[:2] == ["ddpm", "ddim"]
    assert list(PUBLISHED) == ["ddpm", "ddim"]


def test_a_new_solver_is_one_entry(monkeypatch):
    def one_jump(denoise, x_t, steps, noise, betas):
        """x_0 as the first prediction has it."""
        alpha_bar = (1 - betas.double()).prod()
        return (x_t - (1 - alpha_bar).sqrt() * denoise(x_t, len(betas) - 1)) / alpha_bar.sqrt()

    monkeypatch.setitem(SOLVERS, "one_jump", one_jump)
    x_0, eps = torch.full(SHAPE, 2.0, dtype=torch.float64), torch.full(SHAPE, -1.0, dtype=torch.float64)
    alpha_bar = (1 - linear_betas().double()).prod()
    x_T = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    assert (sample(lambda x_t, t: eps, x_T, "one_jump", 1, noise=None) - x_0).abs().max() < 1e-9


# ---- golden trajectories: the published implementation, the same network, the same noise -------------------------------

@pytest.fixture(scope="module")
def golden():
    torch.manual_seed(0)
    unet = ConditionalUNet(**json.loads((DATA / "configs.json").read_text())["unet_small"]).eval()
    unet.load_state_dict(load_file(DATA / "unet_small.safetensors"))
    values = load_file(DATA / "trajectories.safetensors")
    return LatentDiffusion(unet, torch.nn.Identity(), linear_betas(), (3, 8, 8), "eps", torch.device("cpu"), False), values


def test_the_schedule_equals_the_published_one(golden):
    assert torch.equal(linear_betas(), golden[1]["betas"])


DDPM, DDIM = ("ddpm", 1000, "ddpm"), ("ddim", 200, "ddim200")
GUIDANCES = [(0.0, "constant", "baseline"), (0.5, "constant", "w05"), (1.0, "linear", "w10_adaptive"),
             (1.0, "reverse", "w10_reverse")]


@pytest.mark.parametrize("w, schedule, key, solver, steps, prefix", [
    *((*guidance, *DDIM) for guidance in GUIDANCES),
    *(pytest.param(*guidance, *DDPM, marks=pytest.mark.slow) for guidance in GUIDANCES)])
def test_golden_trajectories(golden, w, schedule, key, solver, steps, prefix):
    model, values = golden
    generator = torch.Generator().manual_seed(7)

    def noise(t: int) -> torch.Tensor:  # the prior first, then as the solver asks
        return torch.randn(2, 3, 8, 8, generator=generator)

    x_0 = model.latents(values["context"], values["negative_context"], noise, guided("negative", w, schedule), solver, steps,
                        as_published=True)
    assert (x_0 - values[f"{prefix}_{key}"]).abs().max() < 2e-3


def test_the_golden_trajectories_begin_with_this_noise(golden):
    assert torch.equal(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7)), golden[1]["noise_prior"])
