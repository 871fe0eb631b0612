"""Who is held out of a training run."""
import numpy as np
import pytest

from utils.faces.held_out import held_out
from utils.runtime.errors import UserError


@pytest.mark.parametrize("eligible, identities, part, most, expected", [
    (np.arange(100), 100, 25, 200, [0, 25, 50, 75]),
    (np.arange(100), 100, 10, 3, [0, 33, 66]),  # at most `most`
    (np.arange(10), 10, 25, 200, [0, 5]),  # at least two
    (np.arange(4), 4, 25, 200, [0, 2]),  # the fewest people there can be
    (np.array([3, 4, 8, 9, 20, 21]), 30, 10, 500, [3, 8, 20]),  # spread over the eligible ones
], ids=["a part", "most", "two", "four people", "eligible"])
def test_the_held_out_are_evenly_spread_over_the_eligible(eligible, identities, part, most, expected):
    assert held_out(eligible, identities, part, most).tolist() == expected


@pytest.mark.parametrize("eligible, identities, words", [
    (3, 3, "2 of 3 people, 3 of whom are eligible"),  # two others would not be left
    (1, 30, "3 of 30 people, 1 of whom are eligible"), (0, 10, "2 of 10 people, 0 of whom are eligible")])
def test_too_few_people_are_refused_in_one_line(eligible, identities, words):
    with pytest.raises(UserError, match=f"{words}.*; give the faces of more people") as error:
        held_out(np.arange(eligible), identities, 10, 500)
    assert "\n" not in str(error.value)
