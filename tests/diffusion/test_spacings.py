"""utils/diffusion/spacings.py: the timesteps against those of diffusers, and their limits."""
import pytest
from diffusers import DPMSolverMultistepScheduler

from models.schedule import alpha_bars, linear_betas
from utils.diffusion.solvers import SOLVERS, check
from utils.diffusion.spacings import EVEN, SPACINGS, leading, published_ddim, timesteps
from utils.runtime.errors import UserError

BETAS = linear_betas()
LEVELS = alpha_bars(BETAS)


def test_timesteps_are_evenly_spaced():
    assert leading(200, LEVELS) == list(range(995, -1, -5))
    assert leading(1000, LEVELS) == list(range(999, -1, -1))
    for steps in (1, 3, 7, 150, 333, 999):
        run = leading(steps, LEVELS)
        gaps = {a - b for a, b in zip(run, run[1:], strict=False)}
        assert len(run) == steps and run[-1] == 0 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_published_ddim_runs_167_steps_where_150_are_asked():
    assert len(published_ddim(1000, 150)) == 167
    assert published_ddim(1000, 200) == leading(200, LEVELS)


@pytest.mark.parametrize("spacing, arguments", [
    ("linspace", {"timestep_spacing": "linspace"}), ("trailing", {"timestep_spacing": "trailing"}),
    ("karras", {"use_karras_sigmas": True}), ("log_snr", {"use_lu_lambdas": True})])
@pytest.mark.parametrize("steps", [5, 6, 8, 10, 15, 20, 30])
def test_spacings_are_those_of_diffusers(spacing, arguments, steps):
    scheduler = DPMSolverMultistepScheduler(1000, trained_betas=BETAS.numpy(), **arguments)
    scheduler.set_timesteps(steps)
    assert timesteps(spacing, "dpm++", steps, BETAS) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["default", "leading", "trailing", "karras", "log_snr"])
def test_timesteps_fall_and_none_comes_twice(spacing):
    for steps in (1, 2, 5, 50, 100, 333, 999, 1000):
        run = timesteps(spacing, "ddim", steps, BETAS)
        assert len(run) == steps and run == sorted(set(run), reverse=True)
        assert 0 <= run[-1] and run[0] <= 999


def test_the_default_is_each_solvers_own():
    for solver in SOLVERS.keys() - {"fitted"}:
        own = "leading" if solver in EVEN else "linspace"
        assert timesteps("default", solver, 10, BETAS) == timesteps(own, solver, 10, BETAS)


@pytest.mark.parametrize("spacing", ["default", *SPACINGS])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "fitted"])
def test_every_solver_runs_in_every_spacing(solver, spacing):
    for steps in (1, 6, 15, 100):
        check(solver, steps, False, 1000, spacing)


def test_the_published_solvers_have_their_own_spacing():
    with pytest.raises(UserError, match="sampling.spacing: trailing is impossible with sampling.as_published=true"):
        check("ddim", 50, True, 1000, "trailing")
