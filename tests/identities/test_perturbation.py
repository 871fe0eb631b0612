"""Perturbed contexts by hand, against float64, and as distributions."""
import numpy as np
import pytest
from scipy import stats

from utils.diffusion.noise import CONE, DIRECTION, gaussian, uniform
from utils.identities import contexts as identity_contexts
from utils.identities.perturbation import covariance_root, lowest_cosines, perturbed
from utils.runtime.errors import UserError


def streams(images: list[tuple[int, int]], dimension: int) -> tuple[np.ndarray, np.ndarray]:
    identities, samples = map(list, zip(*images, strict=True))
    return (uniform(42, identities, samples, CONE, ()).numpy(),
            gaussian(42, identities, samples, DIRECTION, (dimension,)).numpy())


@pytest.mark.parametrize("lowest, u, noise, expected", [
    (0.5, 0.2, (5, 3, 4), (0.6, 0.48, 0.64)),  # c = .6; n = (0, .6, .8)
    (0.0, 0.8, (-9, 0, -2), (0.8, 0, -0.6)),
    (0.0, 0.0, (1, 1, 0), (0, 1, 0)),
    (1.0, 0.3, (1, 2, 3), (1, 0, 0)),
    (0.7, 1.0, (1, 2, 3), (1, 0, 0)),
])
def test_by_hand(lowest, u, noise, expected):
    found = perturbed(np.float32([[1, 0, 0]]), np.array([lowest]), np.array([u]), np.float32([noise]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected], atol=1e-7)


@pytest.mark.parametrize("along_contexts", [False, True])
def test_equals_float64_one_by_one(along_contexts):
    contexts = identity_contexts.uniform(40, 16, seed=1)
    lowest, (u, noise) = np.linspace(0, 0.95, 40), streams([(i, 3) for i in range(40)], 16)
    root = covariance_root(contexts) if along_contexts else None
    found = perturbed(contexts, lowest, u, noise, root)
    for i in range(40):
        v, n = contexts[i].astype(np.float64), noise[i].astype(np.float64)
        n = root @ n if along_contexts else n
        n = n - n.dot(v) / v.dot(v) * v
        c = lowest[i] + (1 - lowest[i]) * u[i]
        np.testing.assert_allclose(found[i], c * v + (1 - c * c) ** 0.5 * n / n.dot(n) ** 0.5, atol=3e-7)
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, atol=1e-6)


def test_the_cosine_is_uniform_above_the_bound_and_the_direction_is_even():
    v = identity_contexts.uniform(1, 6, seed=2)
    u, noise = streams([(7, k) for k in range(4000)], 6)
    found = perturbed(v.repeat(4000, axis=0), np.full(4000, 0.6), u, noise).astype(np.float64)
    cosines = found @ v[0].astype(np.float64)
    assert stats.kstest(cosines, stats.uniform(0.6, 0.4).cdf).statistic < 0.026  # 1% level at 4,000 values
    sideways = (found - cosines[:, None] * v) / np.sqrt(1 - cosines**2)[:, None]
    assert np.abs(sideways.mean(axis=0)).max() < 0.03  # 4 sigma
    np.testing.assert_allclose(np.cov(sideways.T), (np.eye(6) - np.outer(v, v)) / 5, atol=0.02)


def test_noise_of_the_contexts_covariance_stays_where_the_contexts_are():
    plane = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 3)))[0]
    contexts = identity_contexts.normalise(identity_contexts.uniform(30, 3, seed=0) @ plane.T)
    lowest, (u, noise) = np.full(30, 0.2), streams([(i, 0) for i in range(30)], 8)
    outside = np.eye(8) - plane @ plane.T
    inside, isotropic = (perturbed(contexts, lowest, u, noise, root) @ outside for root in (covariance_root(contexts), None))
    assert np.abs(inside).max() < 1e-6 and np.linalg.norm(isotropic, axis=1).mean() > 0.2


def test_the_root_is_that_of_the_covariance_and_symmetric():
    contexts = identity_contexts.uniform(50, 12, seed=4) * np.linspace(0.1, 2, 12)
    root = covariance_root(contexts)
    np.testing.assert_allclose(root @ root, np.cov(contexts.astype(np.float64).T), atol=1e-12)
    np.testing.assert_allclose(root, root.T, atol=1e-12)


def test_contexts_on_one_line_have_no_covariance_to_draw_from():
    with pytest.raises(UserError, match="variety.cone_noise: 2 contexts have too few directions"):
        covariance_root(identity_contexts.uniform(2, 8, seed=0))


def test_bounds_by_hand():
    degrees = np.radians([0, 60, 180])
    contexts = np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)
    assert lowest_cosines(contexts, 0.3, safe=False).tolist() == [0.3] * 3
    np.testing.assert_allclose(lowest_cosines(contexts, 0.3, safe=True), [3**0.5 / 2, 3**0.5 / 2, 0.5], atol=1e-7)
    np.testing.assert_allclose(lowest_cosines(contexts, 0.6, safe=True), [3**0.5 / 2, 3**0.5 / 2, 0.6], atol=1e-7)


def test_within_the_safe_bound_none_is_nearer_to_another_identity():
    contexts = identity_contexts.uniform(60, 4, seed=3)  # crowded
    images = [(i, k) for i in range(60) for k in range(20)]
    rows, (u, noise) = [i for i, _ in images], streams(images, 4)
    def strays(safe: bool) -> int:
        found = perturbed(contexts[rows], lowest_cosines(contexts, 0.0, safe)[rows], u, noise).astype(np.float64)
        cosines = found @ contexts.T.astype(np.float64)
        return int((cosines[range(len(rows)), rows] < cosines.max(axis=1) - 1e-6).sum())
    assert strays(safe=True) == 0 and strays(safe=False) > 100


@pytest.mark.parametrize("along_contexts", [False, True])
def test_bit_identical_in_any_batch(along_contexts):
    contexts = identity_contexts.uniform(9, 64, seed=0)
    root = covariance_root(contexts) if along_contexts else None
    images = [(i, k) for i in range(9) for k in range(3)]
    rows, lowest = [i for i, _ in images], np.linspace(0, 0.9, 9)
    together = perturbed(contexts[rows], lowest[rows], *streams(images, 64), root)
    for place, (i, k) in enumerate(images):
        alone = perturbed(contexts[[i]], lowest[[i]], *streams([(i, k)], 64), root)
        assert np.array_equal(alone[0], together[place])
