"""TAR at FAR over all pairs against every pair in explicit float64."""
from itertools import combinations

import numpy as np
import pytest

from utils.evaluation import all_pairs, scores
from utils.evaluation.all_pairs import tar_at_far
from utils.runtime.errors import UserError


def people(identities=40, noise=1.2, dimension=12, seed=0):
    """Embeddings in shuffled order, one to six images an identity, and names whose order is not the rows'."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([f"p{k * 7 % identities:02d}" for k in range(identities)], rng.integers(1, 7, identities))
    centres = {name: rng.normal(size=dimension) for name in np.unique(labels)}
    x = np.stack([centres[name] for name in labels]) + noise * rng.normal(size=(len(labels), dimension))
    order = rng.permutation(len(x))
    return x[order] * rng.uniform(0.5, 3, (len(x), 1)), labels[order]


def explicit(x, labels, times=None):
    """Genuine and impostor cosines pair by pair; an identity counts as often as `times` says."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    genuine, impostor = [], []
    for i, j in combinations(range(len(x)), 2):
        a, b = labels[i], labels[j]
        (genuine if a == b else impostor).extend([x[i] @ x[j]] * (1 if times is None else times[a] * (1 if a == b else times[b])))
    return np.array(genuine), np.array(impostor)


def direct_tar(genuine, impostor, far):
    """The highest TAR of all thresholds that accept no more than far of the impostor pairs; scores above it are accepted."""
    return max((genuine > t).mean() for t in (*impostor, -2) if (impostor > t).sum() <= far * len(impostor) + 1e-9)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 29)
    monkeypatch.setattr(all_pairs, "FEWEST", 2)
    monkeypatch.setattr(all_pairs, "FAR", (0.05, 0.01, 1e-3, 1e-6))


def test_tar_is_that_of_explicit_pairs():
    x, labels = people()
    genuine, impostor = explicit(x, labels)
    result = tar_at_far(x, labels, replicates=2)
    assert (result.genuine_pairs, result.impostor_pairs) == (len(genuine), len(impostor))
    assert list(result.tar) == [0.05, 0.01, 1e-3]  # 1e-6 of some ten thousand pairs is none
    for far, tar in result.tar.items():
        assert tar == pytest.approx(direct_tar(genuine, impostor, far), abs=1e-12)
    assert 0.02 < result.tar[1e-3] < result.tar[0.01] < result.tar[0.05] < 1


def explicit_interval(x, labels, far, replicates, seed):
    """The 90% interval of direct_tar over resampled identities, and how far the values spread."""
    names = np.unique(labels)
    values = []
    for drawn in np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates):
        genuine, impostor = explicit(x, labels, dict(zip(names, drawn, strict=True)))
        values.append(direct_tar(genuine, impostor, far))
    return tuple(np.quantile(values, (0.05, 0.95))), np.ptp(values)


@pytest.mark.parametrize("tail", [4_000_000, 3000], ids=["all impostors", "the most similar"])
def test_intervals_are_those_of_resampled_explicit_pairs(monkeypatch, tail):
    monkeypatch.setattr(all_pairs, "TAIL", tail)
    x, labels = people(identities=25, seed=3)
    result = tar_at_far(x, labels, replicates=20, seed=5)
    for far in (0.05, 0.01):
        expected, spread = explicit_interval(x, labels, far, replicates=20, seed=5)
        assert result.intervals[far] == pytest.approx(expected, abs=1e-12)
        assert spread > 0.05


def test_a_threshold_below_the_kept_impostors_has_no_interval(monkeypatch):
    x, labels = people()
    impostors = len(explicit(x, labels)[1])
    monkeypatch.setattr(all_pairs, "TAIL", impostors // 30)  # 3.3%
    result = tar_at_far(x, labels, replicates=50)
    assert list(result.tar) == [0.05, 0.01, 1e-3] and list(result.intervals) == [0.01, 1e-3]


def test_equal_scores_are_accepted_or_refused_together():
    x = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]], dtype=float)
    result = tar_at_far(x, [0, 0, 0, 1, 1, 1])
    assert result.tar == {}  # 5% of nine impostor pairs is none
    x, labels = np.repeat(np.eye(12), 2, axis=0), np.repeat(np.arange(12), 2)
    x[1], x[3] = x[2], x[0]  # two people exchanged: their genuine scores are 0, four impostor scores 2 x 1
    genuine, impostor = explicit(x, labels)
    assert (genuine > 0.5).sum() == 10 and (impostor > 0.5).sum() == 2
    result = tar_at_far(x, labels, replicates=30)
    assert result.tar == {0.05: pytest.approx(10 / 12), 0.01: pytest.approx(10 / 12)}  # 2 of 264 pairs are less than 1%
    expected, spread = explicit_interval(x, labels, 0.05, replicates=30, seed=0)
    assert result.intervals[0.05] == pytest.approx(expected) and spread > 0.05


def test_two_of_two_hundred_are_one_per_cent(monkeypatch):
    """A FAR that is reached exactly counts, in the figure and in each replicate."""
    monkeypatch.setattr(all_pairs, "FAR", (0.01,))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 8))
    labels = np.repeat(np.arange(5), 5)  # 250 impostor pairs, 50 genuine
    genuine, impostor = explicit(x, labels)
    assert tar_at_far(x, labels).tar[0.01] == pytest.approx((genuine > np.sort(impostor)[-3]).mean())


def test_few_people_have_no_interval_and_no_genuine_pair_is_refused():
    x, labels = people(identities=9)
    assert tar_at_far(x, labels).intervals == {} != tar_at_far(x, labels).tar
    with pytest.raises(UserError, match="no genuine pair"):
        tar_at_far(np.eye(12), np.arange(12))
