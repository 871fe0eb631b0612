"""Other images of the same person."""
import numpy as np
import pytest

from utils.training.extras import Partners

LABELS = np.array([0, 1, 1, 1, 2, 2, 5])


def test_partners_are_of_the_same_person_and_each_of_them_as_often():
    numbers = np.repeat(np.arange(len(LABELS)), 500)
    other = Partners(LABELS).other(numbers, np.random.default_rng(0).random(len(numbers)))
    assert (LABELS[other] == LABELS[numbers]).all()
    alone = np.isin(numbers, (0, 6))
    assert (other[alone] == numbers[alone]).all() and (other[~alone] != numbers[~alone]).all()
    for number, others in {1: (2, 3), 2: (1, 3), 3: (1, 2)}.items():
        assert np.bincount(other[numbers == number], minlength=4)[list(others)] == pytest.approx(250, abs=60)


def test_the_number_chooses_evenly_among_the_others():
    partners = Partners(LABELS)
    for number, expected in {0: [0] * 4, 1: [2, 2, 3, 3], 2: [3, 3, 1, 1], 3: [1, 1, 2, 2], 4: [5] * 4, 5: [4] * 4,
                             6: [6] * 4}.items():
        found = partners.other(np.full(4, number), np.array([0.0, 0.499, 0.5, np.nextafter(1, 0)]))
        assert found.tolist() == expected
