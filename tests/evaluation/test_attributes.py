"""Who is in a set of faces, on embeddings that tell it."""
import numpy as np
import pytest

from utils.evaluation.attributes import age_group, fit, shares
from utils.identities.contexts import normalise


def embeddings_of(classes: np.ndarray, seed: int) -> np.ndarray:
    """Unit vectors [N, 8] around one of three directions."""
    noise = 0.6 * np.random.default_rng(seed).standard_normal((len(classes), 8))
    return normalise(3 * np.eye(8)[classes] + noise)


def test_shares_are_estimated_of_a_set_unlike_the_labelled_one():
    labelled = np.random.default_rng(0).integers(0, 3, 600)
    names = np.array(["a", "b", "c"])
    first, second = fit(embeddings_of(labelled, 1), {"letter": names[labelled], "luck": names[np.arange(600) % 2]})
    assert first.accuracy > 0.95 and first.majority < 0.45
    assert second.accuracy == pytest.approx(0.5, abs=0.12)  # it has nothing to go by
    others = np.repeat([0, 1, 2], (80, 15, 5))
    found = shares(first, embeddings_of(others, 2))
    assert found == pytest.approx({"a": 0.8, "b": 0.15, "c": 0.05}, abs=0.03)


@pytest.mark.parametrize("age, group", [(18, "18 to 29"), (29, "18 to 29"), (30, "30 to 44"), (59, "45 to 59"),
                                        (60, "60 and over"), (116, "60 and over")])
def test_ages_have_groups(age, group):
    assert age_group(age) == group
