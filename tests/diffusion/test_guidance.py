"""utils/diffusion/guidance.py: equation 3 and the schedules, by hand."""
import pytest
import torch

from utils.diffusion.guidance import combine, negative_guided, schedule


def test_equation_3_by_hand():
    eps_pos, eps_neg = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert combine(eps_pos, eps_neg, 0.5).tolist() == [0.0, 4.0]
    assert combine(eps_pos, eps_neg, 0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name, at_0, at_500, at_999", [
    ("constant", 2.0, 2.0, 2.0),
    ("linear", 2.0, 1.0, 0.002),
    ("reverse", 0.0, 1.0, 1.998),
    ("interval", 0.0, 2.0, 0.0),
])
def test_schedules(name, at_0, at_500, at_999):
    w = schedule(name, 2.0, 1000, interval=(200, 800))
    assert [w(0), w(500), w(999)] == pytest.approx([at_0, at_500, at_999])


def test_interval_includes_its_ends():
    w = schedule("interval", 1.0, 1000, interval=(200, 800))
    assert [w(199), w(200), w(800), w(801)] == [0, 1, 1, 0]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="cosine"):
        schedule("cosine", 1.0, 1000)


def test_the_negative_pass_is_not_run_where_w_is_0():
    calls = []

    def one(x_t, t):
        calls.append(("one", t))
        return x_t

    def both(x_t, t):
        calls.append(("both", t))
        return x_t, 2 * x_t

    denoise = negative_guided(one, both, schedule("interval", 1.0, 10, interval=(3, 5)))
    x_t = torch.ones(2)
    outputs = {t: denoise(x_t, t).tolist() for t in (2, 3, 5, 6)}
    assert calls == [("one", 2), ("both", 3), ("both", 5), ("one", 6)]
    assert outputs == {2: [1, 1], 3: [0, 0], 5: [0, 0], 6: [1, 1]}
