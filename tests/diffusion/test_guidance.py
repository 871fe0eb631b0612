"""utils/diffusion/guidance.py: equation 3, the other rules and the schedules, by hand."""
import math

import pytest
import torch
from torch import Tensor

from models.schedule import alpha_bars, linear_betas
from utils.diffusion import guidance
from utils.diffusion.guidance import RULES, SCHEDULES, guided


class Told:
    """A model whose contexts are its predictions, at a given alpha_bar; it notes its passes."""

    def __init__(self, alpha_bar: float = 0.5, T: int = 10) -> None:
        self.level, self.T = alpha_bar, T
        self.passes: list[tuple[str, int]] = []

    def eps(self, x_t: Tensor, t: int, contexts: Tensor) -> Tensor:
        self.passes.append(("one", t))
        return contexts

    def eps_pair(self, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor) -> tuple[Tensor, Tensor]:
        self.passes.append(("both", t))
        return c_pos, c_neg

    def alpha_bar(self, t: int) -> float:
        return self.level


def image(*values: float) -> Tensor:
    """One image of one row, [1, 1, 1, len(values)]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


# ---- equation 3 ------------------------------------------------------------------------------------------------------

def test_equation_3_by_hand():
    eps_pos, eps_neg = image(1.0, 2.0), image(3.0, -2.0)
    for w, expected in ((0.5, [0.0, 4.0]), (1.0, [-1.0, 6.0]), (0.0, [1.0, 2.0])):
        eps = RULES["negative"](Told(), image(9.0, 9.0), 5, eps_pos, eps_neg, w, {})
        assert eps.flatten().tolist() == expected


def test_each_image_may_have_its_own_w():
    eps_pos, eps_neg = torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)
    w = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    assert RULES["negative"](Told(), eps_pos, 5, eps_pos, eps_neg, w, {}).flatten().tolist() == [1.5, 1.5, 3.0, 3.0]


# ---- adaptive projected guidance -------------------------------------------------------------------------------------

@pytest.fixture
def set_apg(monkeypatch):
    def set_constants(eta: float, momentum: float, rms: float) -> None:
        for name, value in (("ETA", eta), ("MOMENTUM", momentum), ("RMS", rms)):
            monkeypatch.setattr(guidance, f"APG_{name}", value)

    return set_constants


@pytest.mark.parametrize("w", [0.5, 3.0])
@pytest.mark.parametrize("t", [1, 100, 500, 999])
def test_apg_is_equation_3_where_all_of_the_difference_is_kept(set_apg, w, t):
    set_apg(eta=1.0, momentum=0.0, rms=1e9)
    model, generator = Told(alpha_bars(linear_betas())[t]), torch.Generator().manual_seed(t)
    x_t, eps_pos, eps_neg = torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    state = {}
    for _ in range(2):  # without momentum the second step is no other than the first
        eps = RULES["apg"](model, x_t, t, eps_pos, eps_neg, w, state)
        assert (eps - RULES["negative"](model, x_t, t, eps_pos, eps_neg, w, {})).abs().max() < 1e-5


def test_apg_by_hand(set_apg):
    """alpha_bar = 1/2, so that x_0 = (x_t - a eps) / a with a = sqrt(1/2), and the difference in x_0 is that of eps."""
    set_apg(eta=0.5, momentum=0.0, rms=math.sqrt(1 / 2))
    a = math.sqrt(1 / 2)
    x_t, eps_pos, eps_neg = a * image(3.0, 4.0), image(0.0, 0.0), image(0.0, 5.0)
    # The difference (0, 5) has an rms of 5 sqrt(1/2), and is cut to (0, 1). Of it 4/25 (3, 4) = (0.48, 0.64) lies along
    # x_0 = (3, 4), and half of that is left out: (-0.24, 0.68). Twice this is added to x_0: (2.52, 5.36).
    eps = RULES["apg"](Told(1 / 2), x_t, 5, eps_pos, eps_neg, 2.0, {})
    assert eps.flatten().tolist() == pytest.approx([3 - 2.52, 4 - 5.36], abs=1e-12)


def test_apg_remembers_the_difference_as_it_was_before_the_limit(set_apg):
    set_apg(eta=1.0, momentum=-0.5, rms=1.0)
    x_t, nothing, state = image(3.0, 4.0), image(0.0, 0.0), {}
    first = RULES["apg"](Told(1 / 2), x_t, 5, nothing, image(0.0, 5.0), 1.0, state)
    assert first.flatten().tolist() == pytest.approx([0.0, -math.sqrt(2)], abs=1e-12)  # rms 1
    second = RULES["apg"](Told(1 / 2), x_t, 4, nothing, image(1.0, 3.0), 1.0, state)
    assert second.flatten().tolist() == pytest.approx([-1.0, -(3 - 0.5 * 5)], abs=1e-12)
    anew = RULES["apg"](Told(1 / 2), x_t, 4, nothing, image(1.0, 0.5), 1.0, {})
    assert anew.flatten().tolist() == pytest.approx([-1.0, -0.5], abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_treats_each_image_alone(rule):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 3, 2, 4, 8, 8, generator=generator)  # of x_t, eps_pos and eps_neg

    def run(images: slice) -> list[Tensor]:
        state = {}
        return [RULES[rule](Told(0.3), x_t[images], 5, eps_pos[images], eps_neg[images], 0.7, state)
                for x_t, eps_pos, eps_neg in steps]

    for together, first, second in zip(run(slice(0, 2)), run(slice(0, 1)), run(slice(1, 2)), strict=True):
        assert (together - torch.cat([first, second])).abs().max() < 1e-6


# ---- fewer negative passes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, every", [("every2", 2), ("every3", 3)])
def test_the_difference_is_used_again_between_negative_passes(rule, every):
    model = Told()
    steps = [(image(float(i)), image(float(-i * i))) for i in range(1, 8)]
    state, drawn = {}, []
    for t, (eps_pos, eps_neg) in zip(range(9, 2, -1), steps, strict=True):
        drawn.append(RULES[rule](model, image(7.0), t, eps_pos, eps_neg, 0.5, state).item())
    assert [kind for kind, _ in model.passes] == ["both" if i % every == 0 else "one" for i in range(7)]
    latest = [steps[i - i % every] for i in range(7)]
    assert drawn == pytest.approx([eps_pos.item() + 0.5 * (p - n).item() for (eps_pos, _), (p, n) in
                                   zip(steps, latest, strict=True)])


# ---- schedules -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, at_0, at_500, at_999", [
    ("constant", 2.0, 2.0, 2.0),
    ("linear", 2.0, 1.0, 0.002),
    ("reverse", 0.0, 1.0, 1.998),
    ("interval", 0.0, 2.0, 0.0),
])
def test_schedules(name, at_0, at_500, at_999):
    w = [SCHEDULES[name](2.0, t, 1000, (200, 800)) for t in (0, 500, 999)]
    assert w == pytest.approx([at_0, at_500, at_999])


def test_interval_includes_its_ends():
    assert [SCHEDULES["interval"](1.0, t, 1000, (200, 800)) for t in (199, 200, 800, 801)] == [0, 1, 1, 0]


# ---- rule and schedule together --------------------------------------------------------------------------------------

def test_the_negative_pass_is_not_run_where_w_is_0():
    model, x_t = Told(), image(7.0)
    denoise = guided("negative", 1.0, "interval", (3, 5))(model, image(1.0), image(2.0))
    outputs = {t: denoise(x_t, t).item() for t in (2, 3, 5, 6)}
    assert model.passes == [("one", 2), ("both", 3), ("both", 5), ("one", 6)]
    assert outputs == {2: 1, 3: 0, 5: 0, 6: 1}
    model.passes.clear()
    reverse = guided("negative", 1.0, "reverse")(model, image(1.0), image(2.0))
    assert [reverse(x_t, t).item() for t in (5, 0)] == [0.5, 1] and model.passes == [("both", 5), ("one", 0)]


@pytest.mark.parametrize("guide", [guidance.unguided, guided("negative", 0.0), guided("apg", 0.0, "linear")])
def test_w_0_needs_no_negative(guide):
    model = Told()
    denoise = guide(model, image(1.0), None)
    assert [denoise(image(7.0), t).item() for t in (9, 0)] == [1, 1]
    assert model.passes == [("one", 9), ("one", 0)]


def test_the_schedule_is_that_of_the_models_T():
    denoise = guided("negative", 1.0, "linear")(Told(T=100), image(1.0), image(0.0))
    assert denoise(image(7.0), 75).item() == pytest.approx(1.25)


def test_every_batch_starts_with_nothing_remembered():
    guide, x_t = guided("apg", 1.0), image(3.0, 4.0)
    first, second = (guide(Told(), image(0.0, 0.0), image(0.01, 0.02)) for _ in range(2))
    at_x_T = first(x_t, 9)
    assert not torch.equal(first(x_t, 8), at_x_T)  # which has a difference to remember
    assert torch.equal(second(x_t, 9), at_x_T)


def test_a_new_rule_and_schedule_are_one_entry_each(monkeypatch):
    monkeypatch.setitem(RULES, "difference", lambda model, x_t, t, c_pos, c_neg, w, state: w * (c_pos - c_neg))
    monkeypatch.setitem(SCHEDULES, "square", lambda w, t, T, interval: w * (t / T) ** 2)
    denoise = guided("difference", 4.0, "square")(Told(), image(3.0), image(1.0))
    assert denoise(image(7.0), 5).item() == 2.0


# ---- a w for each image ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, w", [("constant", 3.0), ("uniform", [0.3, 1.47, 1.5, 2.7]), ("mixture", [3, 3, 0, 0])])
def test_the_w_of_each_image(name, w):
    u = torch.tensor([0.1, 0.49, 0.5, 0.9], dtype=torch.float64).view(4, 1, 1, 1)
    found = guidance.W_PER_IMAGE[name](3.0, u)
    assert found == w if name == "constant" else found.shape == (4, 1, 1, 1) and found.flatten().tolist() == pytest.approx(w)


def test_with_a_w_for_each_image_the_negative_pass_is_not_run_where_the_schedule_is_0():
    model, w = Told(), torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    c_pos, c_neg, x_t = (torch.full((2, 1, 1, 1), value) for value in (1.0, 2.0, 7.0))
    denoise = guided("negative", w, "interval", (3, 5))(model, c_pos, c_neg)
    assert [denoise(x_t, t).flatten().tolist() for t in (6, 4)] == [[1, 1], [1, -1]]
    assert model.passes == [("one", 6), ("both", 4)]
