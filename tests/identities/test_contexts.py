"""Contexts: drawing, files and what is refused."""
import numpy as np
import pytest

from models import context_files
from utils.identities import contexts as identity_contexts
from utils.runtime.errors import UserError

# ---- drawing ---------------------------------------------------------------------------------------------------------

def test_uniform_contexts_are_seeded_unit_and_spread_evenly():
    contexts = identity_contexts.uniform(4000, 16, seed=3)
    assert contexts.shape == (4000, 16) and contexts.dtype == np.float32
    assert np.abs(np.linalg.norm(contexts.astype(np.float64), axis=1) - 1).max() < 1e-7
    # On the unit sphere in D dimensions each coordinate has mean 0 and variance 1/D, and coordinates do not correlate.
    assert np.abs(contexts.mean(axis=0)).max() < 5 * np.sqrt(1 / 16 / 4000)
    assert np.allclose(np.cov(contexts.T), np.eye(16) / 16, atol=6e-3)
    assert np.array_equal(contexts, identity_contexts.uniform(4000, 16, seed=3))
    assert not np.array_equal(contexts, identity_contexts.uniform(4000, 16, seed=4))


def test_more_contexts_begin_with_the_same_ones():
    assert np.array_equal(identity_contexts.uniform(50, 8, seed=1), identity_contexts.uniform(90, 8, seed=1)[:50])


def test_gaussian_contexts_have_the_directions_of_real_ones():
    generator = np.random.default_rng(0)
    axes = generator.standard_normal((6, 6))
    mean, covariance = generator.standard_normal(6) * 0.3, axes @ axes.T * 0.01
    drawn = identity_contexts.gaussian(20_000, mean, covariance, seed=4)
    direct = identity_contexts.normalise(generator.multivariate_normal(mean, covariance, 20_000))
    np.testing.assert_allclose(drawn.mean(axis=0), direct.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(direct.T), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(identity_contexts.gaussian(5, mean, covariance, seed=4), drawn[:5])


# ---- kept apart ------------------------------------------------------------------------------------------------------

def greedy(draws: np.ndarray, number: int, highest: float) -> np.ndarray:
    """One draw after the other, in float64."""
    taken: list[np.ndarray] = []
    for draw in draws.astype(np.float64):
        if len(taken) < number and all(float((draw * other).sum()) <= highest for other in taken):
            taken.append(draw)
    return np.array(taken, dtype=np.float32)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_contexts_apart_are_the_draws_less_those_too_alike_to_one_before(monkeypatch, chunk):
    monkeypatch.setattr(identity_contexts, "CHUNK", chunk)
    draws = identity_contexts.uniform(3000, 6, seed=5)
    apart = identity_contexts.uniform(40, 6, 5, highest_cosine=0.6)
    assert np.array_equal(apart, greedy(draws, 40, 0.6)) and not np.array_equal(apart, draws[:40])
    assert identity_contexts.crowding(apart).max() <= 0.6 + 1e-7
    assert np.array_equal(identity_contexts.uniform(13, 6, 5, highest_cosine=0.6), apart[:13])
    assert np.array_equal(identity_contexts.uniform(40, 6, 5, highest_cosine=1.0), draws[:40])


def test_contexts_of_real_ones_are_kept_apart_too():
    mean, covariance = np.array([0.5, 0, 0, 0, 0, 0]), np.diag([0.2, 0.2, 0.1, 0.1, 0.1, 0.1])
    draws, apart = (identity_contexts.gaussian(number, mean, covariance, 3, highest) for number, highest in ((900, 1), (25, 0.7)))
    np.testing.assert_allclose(apart, greedy(draws, 25, 0.7), atol=1e-7)


def test_a_sphere_that_is_too_full_is_said_in_one_line():
    with pytest.raises(UserError) as caught:
        identity_contexts.uniform(10, 2, 0, highest_cosine=0.0)  # of which there are at most four in a plane
    assert str(caught.value) == ("contexts.highest_cosine: 0 leaves room for 3 of the 10 contexts, in 1024 draws; raise it, or "
                                 "lower contexts.number")


# ---- crowding --------------------------------------------------------------------------------------------------------

def test_crowding_is_each_ones_highest_cosine_to_another(monkeypatch):
    contexts = identity_contexts.uniform(300, 16, seed=0)
    contexts[250] = contexts[4]
    exact = contexts.astype(np.float64) @ contexts.T.astype(np.float64)
    np.fill_diagonal(exact, -np.inf)
    monkeypatch.setattr(identity_contexts, "BLOCK_BYTES", 8 * 300 * 7)  # 7 rows a block, the last one short
    crowding = identity_contexts.crowding(contexts)
    assert np.allclose(crowding, exact.max(axis=1), atol=1e-6)
    assert crowding.max() <= 1
    assert identity_contexts.closest_pair(contexts, crowding) == (4, 250)


def test_cosines_are_those_of_float64_in_blocks_of_rows(monkeypatch):
    contexts = identity_contexts.uniform(50, 16, seed=0) * np.linspace(0.5, 2, 50, dtype=np.float32)[:, None]
    exact = contexts.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    monkeypatch.setattr(identity_contexts, "BLOCK_BYTES", 8 * 20 * 7)
    starts, blocks = zip(*identity_contexts.cosine_blocks(contexts, pool=20), strict=True)
    assert list(starts) == list(range(0, 50, 7)) and {block.dtype for block in blocks} == {np.dtype(np.float64)}
    assert np.abs(np.concatenate(blocks) - exact @ exact[:20].T).max() < 1e-15


# ---- files -----------------------------------------------------------------------------------------------------------

def test_the_files_are_those_of_the_floor_below():
    for name in ("check_contexts", "check_vectors", "digest", "normalise", "row_norms", "write"):
        assert getattr(identity_contexts, name) is getattr(context_files, name)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    contexts = identity_contexts.uniform(4, 8, seed=0)
    ids = ["0", "11", "ann--a", "Zoë"]
    identity_contexts.write(tmp_path / "c.npz", ids, contexts)
    read_ids, read_contexts = identity_contexts.read(tmp_path / "c.npz")
    assert read_ids == ids and np.array_equal(read_contexts, contexts) and read_contexts.dtype == np.float32
    assert identity_contexts.digest(read_ids, read_contexts) == identity_contexts.digest(ids, contexts)


def test_the_digest_sees_ids_values_and_order():
    contexts = identity_contexts.uniform(3, 8, seed=0)
    digests = {identity_contexts.digest(["a", "b", "c"], contexts), identity_contexts.digest(["a", "b", "d"], contexts),
               identity_contexts.digest(["a", "b", "c"], contexts[::-1]),
               identity_contexts.digest(["a", "b", "c"], -contexts)}
    assert len(digests) == 4


GOOD = identity_contexts.uniform(3, 8, seed=0)
NAN, INFINITE, ZERO, LONG = (GOOD * np.where(np.arange(3) == 2, factor, 1)[:, None].astype(np.float32)
                             for factor in (np.nan, np.inf, 0, 1.01))


@pytest.mark.parametrize("ids, contexts, words", [
    ("abc", NAN, "row 2 holds NaN or infinite values"),
    ("abc", INFINITE, "row 2 holds NaN or infinite values"),
    ("abc", ZERO, "row 2 is all zeros"),
    ("abc", LONG, "'c' \\(row 2\\) is not of unit norm"),
    ("abc", GOOD[:, :7] / np.linalg.norm(GOOD[:, :7], axis=1, keepdims=True), "7 wide, the diffusion model takes 8"),
    ("abc", GOOD.ravel(), "not floats \\[N, D\\]"),
    ("abc", GOOD.astype(np.int64), "not floats \\[N, D\\]"),
    ("a", GOOD[:1], "holds 1 context"),
    ("", GOOD[:0], "holds 0 context"),
    ("ab", GOOD, "2 ids for 3 contexts"),
    ("aba", GOOD, "the id 'a' occurs more than once"),
    (["a", "b", "../c"], GOOD, "the id '../c' cannot name a folder"),
    (["a", "b", "/c"], GOOD, "the id '/c' cannot name a folder"),
    (["a", "b", ""], GOOD, "the id '' cannot name a folder"),
    (["a", "b", "c\0d"], GOOD, "the id 'c.x00d' cannot name a folder"),
    (["a", "b", "c\nd"], GOOD, "the id 'c.nd' cannot name a folder"),
    (["a", "b", "c\ud800"], GOOD, "the id 'c.ud800' cannot name a folder"),
    (["a", "b", "é" * 101], GOOD, "the id 'é{101}' cannot name a folder"),
    (["a", "b", ".."], GOOD, "the id '..' cannot name a folder"),
    (["a", "b", "c\\d"], GOOD, "the id .* cannot name a folder"),
])
def test_unusable_contexts_are_refused_in_one_line(tmp_path, ids, contexts, words):
    file = tmp_path / "c.npz"
    np.savez(file, ids=np.array(list(ids), dtype=str), contexts=contexts)
    with pytest.raises(UserError, match=f"c.npz: .*{words}.*; ") as refusal:
        identity_contexts.check_contexts(file, *identity_contexts.read(file), dimension=8)
    assert "\n" not in str(refusal.value)


def test_long_ids_of_any_letters_are_read(tmp_path):
    ids = ["é" * 100, "李 小龙", "a" * 200]
    identity_contexts.write(tmp_path / "c.npz", ids, GOOD)
    assert identity_contexts.read(tmp_path / "c.npz")[0] == ids


def test_unusable_contexts_are_not_written(tmp_path):
    with pytest.raises(UserError, match="c.npz"):
        identity_contexts.write(tmp_path / "c.npz", list("abc"), ZERO)
    assert not list(tmp_path.iterdir())


def test_missing_truncated_and_pickled_files_are_refused(tmp_path):
    file = tmp_path / "c.npz"
    with pytest.raises(UserError, match="c.npz: no such file .*create_sample_identity_contexts.py"):
        identity_contexts.read(file)
    identity_contexts.write(file, list("abc"), GOOD)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="c.npz: is not a readable .npz"):
        identity_contexts.read(file)
    np.savez(file, ids=np.array(["a", {"b": 1}, "c"], dtype=object), contexts=GOOD)
    with pytest.raises(UserError, match="c.npz: is not a readable .npz"):
        identity_contexts.read(file)


def test_ids_that_are_one_name_in_two_forms_are_refused(tmp_path):
    with pytest.raises(UserError, match="occurs more than once"):
        identity_contexts.write(tmp_path / "c.npz", ["Zo\u00eb", "Zoe\u0308"], identity_contexts.uniform(2, 8, seed=0))
