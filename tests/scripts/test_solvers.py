"""experiments/solvers.py: its verdicts on figures made by hand, the search for timesteps, and a run on next to nothing."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config.load import load_config
from experiments import documents, solver_fit, solvers
from experiments.solver_report import MARGINS, agree, choose_reference, differences, is_equivalent
from experiments.solver_trials import METRICS, Candidate, Images, Laboratory, Trial
from models.schedule import alpha_bars, linear_betas
from tests.running import run
from utils.diffusion import latent_diffusion
from utils.diffusion.solvers import fitted, sample
from utils.diffusion.spacings import timesteps
from utils.runtime.errors import UserError
from utils.runtime.files import write_text

WHO = "recogniser"
VALUES = {"fdr": 6.0, "eer": 0.05, "fmr100": 0.2, "genuine_mean": 0.5, "genuine_std": 0.1, "impostor_mean": 0.08,
          "impostor_std": 0.1}
IMAGES = Images(24, 6)
BASE = np.random.default_rng(0).standard_normal((len(IMAGES), 4, 2, 2)).astype(np.float32)


def trial(steps: int = 10, latents: np.ndarray = BASE, spread: float = 0.0, images: Images = IMAGES, **changed) -> Trial:
    """Figures by hand; the replicates are those of VALUES, half of them `spread` above and half below `changed`."""
    noise, sides = np.random.default_rng(1).standard_normal(1000), np.where(np.arange(1000) % 2, 1, -1)
    values = VALUES | changed
    return Trial(Candidate("dpm++", steps), images, latents, 0.1, np.ones(len(images), bool), {WHO: values},
                 {WHO: {name: values[name] * (1 + 0.1 * noise) + spread * sides for name in METRICS}}, {WHO: {}})


# ---- verdicts --------------------------------------------------------------------------------------------------------

def test_the_distance_is_in_the_latents_std_and_of_the_images_that_both_have():
    shifted = BASE + 0.3 * BASE.std()
    assert trial(latents=shifted).distance(trial()) == pytest.approx(0.3, rel=1e-3)
    few = BASE.reshape(24, 6, 4, 2, 2)[:16, :4].reshape(64, 4, 2, 2)
    assert trial(latents=few, images=Images(16, 4)).distance(trial()) == 0


def test_solvers_agree_within_a_hundredth_and_two_percent_of_fdr():
    for shift, fdr, expected in ((0.009, 6.11, True), (0.011, 6.0, False), (0.009, 6.13, False)):
        assert agree(trial(latents=BASE + shift * BASE.std(), fdr=fdr), trial(), WHO) is expected


def test_the_cheapest_of_those_that_agree_is_the_reference():
    fine, finer, far = trial(100), trial(400), trial(200, latents=BASE + 0.1 * BASE.std())

    def cost(one: Trial) -> int:
        return one.candidate.steps

    assert choose_reference([finer, fine, trial(200)], WHO, cost) is fine
    assert choose_reference([far, finer, fine], WHO, cost) is fine
    cheap = trial(50, latents=BASE + 0.1 * BASE.std())
    assert choose_reference([cheap, finer, fine], WHO, cost) is fine
    assert choose_reference([cheap, fine], WHO, cost) is None


def test_differences_are_paired():
    """Replicates that vary by a tenth vary together, so their difference does not."""
    found = differences(trial(fdr=6.2, genuine_mean=0.504), trial(), WHO)
    assert found["fdr"] == pytest.approx((0.2 / 6,) * 3)
    assert found["impostor_mean"] == (0, 0, 0)
    assert found["genuine_mean"][0] == pytest.approx(0.004)
    assert set(found) == MARGINS.keys() - {"coverage", "recall"} and MARGINS == {
        "fdr": 0.05, "genuine_mean": 0.01, "impostor_mean": 0.01, "genuine_std": 0.05, "fmr100": 0.02, "coverage": 0.03,
        "recall": 0.03}


@pytest.mark.parametrize("changed, expected", [
    ({}, True), ({"fdr": 6.2}, True), ({"fdr": 6.4}, False), ({"fdr": 5.6}, False), ({"genuine_mean": 0.512}, False),
    ({"impostor_mean": 0.069}, False), ({"genuine_std": 0.106}, False), ({"fmr100": 0.223}, False), ({"spread": 0.03}, False)])
def test_equivalent_is_what_lies_within_every_margin(changed, expected):
    assert is_equivalent(trial(**changed), trial(), WHO) is expected


def test_without_replicates_nothing_is_equivalent():
    few = trial()
    few.replicates[WHO] = {}
    assert differences(few, trial(), WHO) == {} and not is_equivalent(few, trial(), WHO)


# ---- the fitted solver -----------------------------------------------------------------------------------------------

LEVELS = alpha_bars(linear_betas())


def path(seed: int) -> solver_fit.Path:
    """A model of one number whose eps is nonlinear in t, and its way in 100 steps."""
    x_T = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    x = {}

    def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return (x_t - LEVELS[t] ** 0.5 * torch.tanh(2 * x_t / LEVELS[t] ** 0.5)) / (1 - LEVELS[t]) ** 0.5

    x[-1] = sample(lambda x_t, t: x.setdefault(t, x_t) is None or denoise(x_t, t), x_T, "dpm++", 100, None)
    return solver_fit.Path(denoise, x)


def test_a_fitted_solver_comes_nearer_than_the_others_on_images_that_it_was_not_fitted_to():
    train, held_out = [path(1), path(2)], path(3)
    laboratory = SimpleNamespace(model=SimpleNamespace(alpha_bars=LEVELS))
    found = solver_fit.search(train, 6, laboratory)
    numbers, drawn = solver_fit.regress(train, found, LEVELS)
    assert [t for t, *_ in numbers] == found == sorted(set(found), reverse=True)
    assert [len(row) for row in numbers] == [3, 4, 5, 6, 7, 8]  # the timestep, the weight of x_t, all predictions

    def distance(x_0: torch.Tensor) -> float:
        return solver_fit.rms([x_0], [held_out])[0]

    x_T = held_out.x[999]
    ours = distance(fitted(held_out.denoise, x_T, found, None, linear_betas(), numbers))
    assert ours < 0.5 * min(distance(sample(held_out.denoise, x_T, solver, timesteps(spacing, solver, 6, linear_betas()), None))
                            for solver in ("dpm++", "unipc", "deis3") for spacing in ("linspace", "log_snr", "karras"))
    # what regress follows is what the solver runs
    assert (fitted(train[0].denoise, train[0].x[999], found, None, linear_betas(), numbers) - drawn[0]).abs().max() < 1e-4


def test_timesteps_move_among_those_of_the_teacher():
    known = list(range(990, -1, -10))
    assert solver_fit.neighbours([990, 500, 100], 1, 0.5, known) == [[990, 740, 100], [990, 300, 100]]
    assert solver_fit.neighbours([990, 500, 0], 2, 0.5, known) == [[990, 500, 250]]
    assert solver_fit.neighbours([30, 20, 10], 1, 0.5, known) == []
    assert solver_fit.nearest([999, 503, 7, 2], known) == [990, 500, 10, 0]


def test_the_numbers_are_written_as_they_are_read():
    entries = {6: [(999, 0.1, 1.5), (500, -0.25, 1e-05, 3.0)]}
    scope: dict = {}
    exec(solver_fit.source(entries, weights="ab12"), scope)
    assert scope["FITTED"] == {6: tuple(entries[6])} and scope["WEIGHTS"] == "ab12" and "S4S" in scope["__doc__"]


# ---- the whole -------------------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path):
    for name, value in {"PROOF": Images(10, 2), "SCREEN": Images(2, 2), "SOLVERS": ("unipc", "dpm++"), "SPACINGS": ("linspace",),
                        "REFERENCES": (Candidate("dpm++", 4), Candidate("ddim", 3)), "RULES": ("every2",), "OTHERS": (),
                        "INTERVALS": ((200, 999),), "ANCESTRAL": Candidate("ddpm", 2),
                        "EARLIER": Candidate("dpm++", 2, "linspace")}.items():
        monkeypatch.setattr(solvers, name, value)
    return ["--identities", "10", "--images", "2", "--steps", "2,3", "--best", "1", "--arms", "far", f"paths.output={tmp_path}"]


@pytest.mark.slow
def test_a_small_study_is_done_once_and_its_table_says_what_was_found(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    write_text(tmp_path / "docs" / "solvers.md", "Prose.\n\n{}\nold\n{}\nAfter it.".format(*documents.markers("solvers")))
    run(solvers, *small, "--docs")
    text = (tmp_path / "docs" / "solvers.md").read_text()
    assert text.startswith("Prose.\n") and text.endswith("\nAfter it.") and "old" not in text
    assert "| far | dpm++ default 4 | 10x2 |" in text and "ddpm default 2" in text
    assert "every2" in text and "200..999" in text and "| far | dpm++ linspace 2 |" in text
    assert (tmp_path / "docs" / "demo" / "solvers.png").stat().st_size > 10_000
    assert "TFLOP" in capsys.readouterr().out

    def refuse(*arguments):
        raise AssertionError("drawn again")

    monkeypatch.setattr(Laboratory, "_draw", refuse)
    run(solvers, *small)
    assert (tmp_path / "solvers" / "solvers.md").read_text() in text


def test_what_does_not_fit_is_left_for_the_next_time(small, capsys):
    run(solvers, *small, "--minutes", "0")
    assert "3 trials did not fit into 0 minutes (the first: far, dpm++ default 4, 10x2)" in capsys.readouterr().out


def test_passes_and_timesteps_are_counted(small, tmp_path):
    run(solvers, *small, "--minutes", "0")
    config = load_config("", arguments=[f"paths.output={tmp_path}", "sampling.precision=fp32"])
    laboratory = Laboratory(config, [], torch.device("cpu"), 42)
    assert laboratory.passes("far", Candidate("unipc", 6)) == {"one": 0, "both": 6}
    assert laboratory.passes("w0", Candidate("unipc", 6)) == {"one": 6, "both": 0}
    assert laboratory.passes("far", Candidate("dpm++", 7, rule="every2")) == {"one": 3, "both": 4}
    assert laboratory.passes("far", Candidate("ddim", 10, interval=(200, 999))) == {"one": 2, "both": 8}
    assert laboratory.cost("far", Candidate("ddim", 10, interval=(200, 999))) == pytest.approx(
        2 * laboratory.gflop["one"] + 8 * laboratory.gflop["both"])
    assert laboratory.gflop["one"] == pytest.approx(0.82, abs=0.02) and laboratory.gflop["both"] == pytest.approx(1.51, abs=0.02)


@pytest.mark.parametrize("arguments, words", [
    (["--identities", "101"], "--identities: 101 is more than the 100 contexts"),
    (["scores.recogniser=nowhere.pth"], "nowhere.pth: no such file"), (["--speed"], "--speed: is not understood")])
def test_what_cannot_be_run_is_one_line(small, arguments, words):
    with pytest.raises(UserError, match=words):
        run(solvers, *small, *arguments, "--minutes", "0")


def test_a_fit_is_made_once_and_written_as_a_module(small, tmp_path, monkeypatch, capsys):
    for name, value in {"TEACHER": Candidate("dpm++", 6), "STEPS": (2,), "SEARCHED": range(1), "REGRESSED": range(1),
                        "HELD_OUT": range(1, 2)}.items():
        monkeypatch.setattr(solver_fit, name, value)
    monkeypatch.setattr(latent_diffusion.fitted, "WEIGHTS", "others")  # which the default solver is fitted to
    run(solvers, "fit", *small)
    assert "2 steps, rms distance of latents to the teacher's, held out: far 0." in capsys.readouterr().out
    scope: dict = {}
    exec((tmp_path / "solvers" / "fitted.py").read_text(), scope)
    (t, *first), (t_next, *second) = scope["FITTED"][2]
    assert 999 == t > t_next > 0 and (len(first), len(second)) == (2, 3)

    def refuse(*arguments):
        raise AssertionError("walked again")

    monkeypatch.setattr(solver_fit, "walk", refuse)
    run(solvers, "fit", *small)
