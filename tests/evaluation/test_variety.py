"""Vendi scores, distances and figures against real faces: by hand, and against plain float64 implementations."""
import builtins
import sys
from itertools import combinations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from utils.evaluation import variety
from utils.evaluation.scores import bootstrap
from utils.evaluation.variety import (
    HALVINGS,
    NEAREST,
    against_real,
    compare,
    frechet_distance,
    half_sample_interval,
    halves,
    resampled_mean,
    unit_rows,
    unlimited_frechet_distance,
    within_identity,
)
from utils.runtime.errors import UserError


def people(identities, images, dimension=16, noise=1.0, seed=0):
    """Unit embeddings [identities * images, dimension] around one centre an identity, and labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(identities, 1, dimension)) + noise * rng.normal(size=(identities, images, dimension))
    x = x.reshape(-1, dimension)
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.repeat([f"p{k:03d}" for k in range(identities)], images)


# ---- within an identity ----------------------------------------------------------------------------------------------

def test_vendi_and_distance_by_hand():
    a = np.sqrt(0.5)
    x = [[1, 0, 0], [2, 0, 0], [3, 0, 0],  # alike: one image's worth, whatever the norms
         [1, 0, 0], [0, 1, 0], [0, 0, 1],  # orthogonal: three
         [1, 0, 0], [1, 0, 0], [0, 5, 0],  # eigenvalues 2/3, 1/3
         [1, 0, 0], [a, a, 0], [0, 1, 0]]
    values, n = within_identity(x, np.repeat(["a", "b", "c", "d"], 3))
    assert n == 3
    np.testing.assert_allclose(values["vendi"][:3], [1, 3, 3 / 2 ** (2 / 3)], rtol=0, atol=1e-6)
    # eigenvalues of [[1, a, 0], [a, 1, a], [0, a, 1]] are 1 and 1 +- sqrt(2) a = 0, 1, 2
    assert values["vendi"][3] == pytest.approx(3 / 2 ** (2 / 3))
    chord = np.sqrt(2 - 2 * a)
    np.testing.assert_allclose(values["distance"], [0, np.sqrt(2), np.sqrt(2) * 2 / 3, (2 * chord + np.sqrt(2)) / 3],
                               rtol=0, atol=1e-7)


def test_two_images_by_the_formula():
    cosine = 0.6
    values, n = within_identity([[1, 0], [cosine, 0.8]], ["a", "a"])
    eigenvalues = np.array([1 + cosine, 1 - cosine]) / 2
    assert n == 2 and values["vendi"][0] == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))
    assert values["distance"][0] == pytest.approx(np.sqrt(0.8))


def test_each_identity_has_the_same_number_of_images(monkeypatch):
    monkeypatch.setattr(variety, "BLOCK", 3)
    x, labels = people(10, 5)
    keep = np.ones(len(x), dtype=bool)
    keep[[7, 12, 13, 14]] = False  # p001 has four images, p002 two
    keep[16:20] = False  # p003 has one
    order = np.random.default_rng(0).permutation(np.flatnonzero(keep))
    order = order[np.argsort(labels[order], kind="stable")][::-1]  # shuffled within each, the identities backwards
    values, n = within_identity(x[order], labels[order])
    assert n == 5
    for row in values.values():
        assert np.flatnonzero(np.isnan(row)).tolist() == [1, 2, 3]
    for k in (0, 4, 9):
        own = x[labels == f"p{k:03d}"]
        eigenvalues = np.linalg.eigvalsh(own @ own.T / 5)
        assert values["vendi"][k] == pytest.approx(np.exp(-sum(v * np.log(v) for v in eigenvalues)), abs=1e-12)
        distances = [np.linalg.norm(own[i] - own[j]) for i in range(5) for j in range(i)]
        assert values["distance"][k] == pytest.approx(np.mean(distances), abs=1e-12)


def test_only_the_first_images_count():
    x, labels = people(3, 4)
    more = np.concatenate((x, people(1, 2, seed=1)[0]))
    values, n = within_identity(more, [*labels, "p000", "p000"])
    assert n == 4 and {name: list(row) for name, row in values.items()} == {
        name: list(row) for name, row in within_identity(x, labels)[0].items()}


def test_the_mean_is_resampled_as_the_scores_are():
    x, labels = people(15, 2, noise=0.7)
    cosines = (x[0::2] * x[1::2]).sum(axis=1)  # one genuine pair each, so its mean is the mean over identities
    expected = bootstrap(x, labels, replicates=30, seed=4)["genuine_mean"]
    np.testing.assert_allclose(resampled_mean(cosines, 30, seed=4), expected, rtol=0, atol=1e-12)


def test_identities_left_out_do_not_count():
    values = np.array([1.0, np.nan, 3.0])
    means = resampled_mean(values, 200)
    assert set(np.unique(means[~np.isnan(means)]).round(9)) <= {1, 3, 2, round(5 / 3, 9), round(7 / 3, 9)}
    assert np.isnan(means).sum() == pytest.approx(200 / 27, abs=8)  # the left-out one three times


# ---- against real faces ----------------------------------------------------------------------------------------------

def plain_coverage_and_recall(real, fake, k):
    """Naeem et al. 2020, equations of coverage and recall, point by point."""
    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    covered = [any(np.linalg.norm(point - other) < radius(real, i) for other in fake) for i, point in enumerate(real)]
    recalled = [any(np.linalg.norm(point - other) < radius(fake, j) for j, other in enumerate(fake)) for point in real]
    return np.mean(covered), np.mean(recalled)


def test_coverage_and_recall_equal_a_plain_implementation():
    pytest.importorskip("prdc")
    real, fake = people(12, 4, dimension=6)[0], people(10, 4, dimension=6, noise=0.5, seed=1)[0]
    figures = compare(fake, real)
    coverage, recall = plain_coverage_and_recall(real, fake, NEAREST)
    assert (figures["coverage"], figures["recall"]) == (pytest.approx(coverage), pytest.approx(recall))
    assert 0 < coverage < 1 and 0 < recall < 1


def test_frechet_distance_by_hand_and_by_a_matrix_root():
    rng = np.random.default_rng(0)
    a = np.array([[3, 1], [-3, 1], [3, -1], [-3, -1.0]])  # variances 12 and 4/3, uncorrelated
    assert frechet_distance(a, 2 * a + [5, 7]) == pytest.approx(5**2 + 7**2 + 12 + 4 / 3)  # standard deviations doubled
    a, b = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7)), rng.normal(size=(50, 7)) + 1
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s_a + s_b - 2 * sqrtm(s_a @ s_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    few = a[:4]  # fewer images than dimensions
    assert frechet_distance(few, few + 2) == pytest.approx(7 * 4, rel=1e-6)


def test_an_unlimited_frechet_distance_is_without_what_few_samples_add():
    random = np.random.default_rng(3)
    direction = np.eye(16)[0]
    a, b, other = random.normal(size=(600, 16)), random.normal(size=(300, 16)), random.normal(size=(300, 16)) + 1.5 * direction
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b, other)]
    few = frechet_distance(unit[0], unit[1])
    assert few > 0.01
    assert abs(unlimited_frechet_distance(a, b)) < few / 4  # the same distribution
    many = random.normal(size=(100_000, 16)), random.normal(size=(100_000, 16)) + 1.5 * direction
    true = frechet_distance(*(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in many))
    assert unlimited_frechet_distance(a, other) == pytest.approx(true, rel=0.1)

    a, b = random.normal(size=(2000, 64)), random.normal(size=(150, 64))  # a line through parts of them ends at -0.06
    assert abs(unlimited_frechet_distance(a, b)) < frechet_distance(unit_rows(a), unit_rows(b)) / 4


def test_halves_share_nobody():
    x, labels = people(7, 3)
    order = np.random.default_rng(0).permutation(len(x))
    first, second = halves(x[order] * 4, labels[order])
    number = np.repeat(np.arange(7), 3)
    for half, rows in ((first, number % 2 == 0), (second, number % 2 == 1)):
        np.testing.assert_allclose(sorted(half.tolist()), sorted(x[rows].tolist()), rtol=0, atol=1e-15)
    with pytest.raises(UserError, match="one identity only"):
        halves(x, ["a"] * len(x))


@pytest.mark.slow
def test_generated_faces_are_compared_with_as_many_of_each_half():
    pytest.importorskip("prdc")
    x, labels = people(25, 2, dimension=6, seed=1)
    real = halves(*people(60, 3, dimension=6, noise=0.8, seed=2))  # 90 in each half
    figures, of_halves = against_real(x, labels, real)
    assert figures["real_faces"] == 50
    rows = np.arange(50) * 90 // 50
    first, second = (half[rows] for half in real)
    for name in ("coverage", "recall", "frechet"):
        assert figures[name] == pytest.approx((compare(x, first)[name] + compare(x, second)[name]) / 2)
        assert figures[f"real_{name}"] == pytest.approx((compare(second, first)[name] + compare(first, second)[name]) / 2)
        assert of_halves[name].shape == (2 * HALVINGS,)
    part = np.random.default_rng(0).permutation(25)[np.arange(25).repeat(2)] < 12.5  # 13 people
    for number, some in enumerate((part, ~part)):
        recall = (compare(x[some], first)["recall"] + compare(x[some], second)["recall"]) / 2
        assert of_halves["recall"][number] == pytest.approx(recall)


@pytest.mark.slow
def test_faces_of_few_people_cover_less_than_other_real_faces():
    pytest.importorskip("prdc")
    real = halves(*people(80, 2, dimension=4, seed=2))
    x, labels = people(20, 4, dimension=4, noise=0.05, seed=5)
    figures, _ = against_real(x, labels, real)
    assert figures["coverage"] < figures["real_coverage"] - 0.2
    assert figures["frechet"] > 2 * figures["real_frechet"]


def test_too_few_faces_are_refused_and_few_people_have_no_interval():
    pytest.importorskip("prdc")
    real = halves(*people(30, 2, seed=2))
    assert against_real(*people(2 * (NEAREST + 2) - 1, 2), real)[1] == {}
    with pytest.raises(UserError, match="6 generated and 30 . 30 real faces"):
        against_real(*people(3, 2), real)


def test_the_error_of_a_mean_by_its_halves_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=6)
    of_halves = np.array([values[list(rows)].mean() for rows in combinations(range(6), 3)])  # all of them
    low, high = half_sample_interval(values.mean(), of_halves)
    error = values.std(ddof=1) / np.sqrt(6)
    assert (high - low) / 2 == pytest.approx(1.729 * error) and (high + low) / 2 == pytest.approx(values.mean())


def test_a_missing_package_is_one_line(monkeypatch):
    imported = builtins.__import__
    monkeypatch.delitem(sys.modules, "prdc", raising=False)

    def without_prdc(name, *arguments, **keywords):
        if name == "prdc":
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_prdc)
    with pytest.raises(UserError, match="scores.real: .*pip install -c constraints.txt prdc"):
        variety.require_prdc()
