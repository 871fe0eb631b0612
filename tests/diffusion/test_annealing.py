"""Condition annealing by hand, and against eps from networks that keep no tokens."""
import pytest
import torch

from utils.diffusion.annealing import annealed, gamma
from utils.diffusion.guidance import guided

CONTEXT = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0.6, 0.8]])
NOISE = torch.tensor([[0, 2.0, 0, 0], [3.0, 0, 0, 0]])


@pytest.mark.parametrize("t, T, left", [(0, 1000, 1), (599, 1000, 1), (675, 1000, 0.75), (750, 1000, 0.5), (900, 1000, 0),
                                        (999, 1000, 0), (30, 40, 0.5)])
def test_the_schedule(t, T, left):
    assert gamma(t, T) == pytest.approx(left, abs=1e-12)


def test_by_hand():
    found = annealed(CONTEXT, 750, lambda t: NOISE, 1000, 0.5)  # sqrt(1/2) c + 0.5 sqrt(1/2) n / 2
    expected = torch.tensor([[1, 0.5, 0, 0], [0.75, 0, 0.6, 0.8]])
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_where_no_context_is_left_the_noise_has_the_direction_and_where_all_is_left_it_is_the_same_tensor():
    torch.testing.assert_close(annealed(CONTEXT, 950, lambda t: NOISE, 1000, 0.1), NOISE / NOISE.norm(dim=1, keepdim=True))
    assert annealed(CONTEXT, 500, lambda t: pytest.fail("drawn for nothing"), 1000, 0.1) is CONTEXT


def test_the_rule_sees_it_in_the_identity_s_context_alone():
    class Told:
        T = 10

        def eps(self, x_t, t, c):
            seen.append((t, c.item()))
            return c

        def eps_pair(self, x_t, t, c_pos, c_neg):
            seen.append((t, c_pos.item(), c_neg.item()))
            return c_pos, c_neg

    seen = []
    denoise = guided("negative", 1.0, "interval", (0, 5), lambda c, t: c + t)(Told(), torch.tensor(10.0), torch.tensor(3.0))
    assert [denoise(torch.zeros(1), t).item() for t in (9, 5, 2)] == [19, 27, 21]
    assert seen == [(9, 19), (5, 15, 3), (2, 12, 3)]
