"""Negatives against float64 brute force over explicit cosines, and by hand."""
import numpy as np
import pytest

from tests.runtime.mutations import check_reader
from utils.identities import contexts as identity_contexts
from utils.identities import negatives
from utils.identities.negatives import STRATEGIES, select
from utils.runtime.errors import UserError


def random_contexts(number: int, dimension: int = 32, seed: int = 0) -> np.ndarray:
    return identity_contexts.uniform(number, dimension, seed)


def with_duplicates_and_antipodes(number: int, dimension: int = 32) -> np.ndarray:
    contexts = random_contexts(number, dimension)
    contexts[number // 2] = contexts[1]
    contexts[number - 1] = contexts[1]
    contexts[3] = -contexts[2]
    contexts[number - 2] = -contexts[1]
    return contexts


def at_angles(*angles: float) -> np.ndarray:
    """Contexts in the plane at these angles, in float64."""
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def brute_force(contexts: np.ndarray) -> np.ndarray:
    """All cosines [N, N], pair by pair in float64, without a matrix product."""
    exact = contexts.astype(np.float64)
    exact /= np.sqrt((exact * exact).sum(axis=1, keepdims=True))
    return np.stack([(exact * row).sum(axis=1) for row in exact])


RANK = {"close": lambda others: others - 1, "mid": lambda others: (others - 1) // 2, "far": lambda others: 0}


# ---- ranked by cosine ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, dimension, pool", [(2, 32, 0), (3, 32, 0), (4, 2, 0), (4, 8, 2), (101, 32, 0), (500, 2, 0),
                                                     (500, 2, 90), (1000, 64, 300), (1000, 512, 0)])
def test_ranked_strategies_equal_float64_brute_force(number, dimension, pool):
    contexts = random_contexts(number, dimension) if number < 100 else with_duplicates_and_antipodes(number, dimension)
    cosines = brute_force(contexts)
    for strategy, rank in RANK.items():
        vectors, index, similarity = select(contexts, strategy, pool=pool)
        assert index.dtype == np.int64 and similarity.dtype == vectors.dtype == np.float32
        assert np.array_equal(vectors, contexts[index])
        for row in range(number):
            others = np.setdiff1d(np.arange(pool or number), row)
            wanted = np.sort(cosines[row, others])[rank(len(others))]
            assert index[row] == others[np.abs(cosines[row, others] - wanted) <= 1e-12][0]
            assert abs(similarity[row] - wanted) < 1e-6


@pytest.mark.parametrize("number, rank", [(5, 1), (6, 2)])
def test_mid_is_the_lower_median_of_the_others(number, rank):
    # 4 others have ranks 0 to 3 and two medians, 1 and 2; 5 others have the one median 2.
    angles = [0.0, 0.3, 0.7, 1.2, 1.8, 2.5][:number]
    _, index, similarity = select(at_angles(*angles), "mid")
    assert index[0] == number - 1 - rank  # cosines to the first context fall with the angle
    assert similarity[0] == pytest.approx(np.cos(angles[index[0]]), abs=1e-7)


def test_an_identity_may_get_its_duplicate_but_never_itself():
    contexts = with_duplicates_and_antipodes(40)
    _, index, similarity = select(contexts, "close")
    assert (index[1], index[20], index[39]) == (20, 1, 1)
    assert similarity[1] == similarity[20] == 1
    _, index, similarity = select(contexts, "far")
    assert index[1] == index[20] == index[39] == 38
    assert index[2] == 3 and similarity[2] == -1
    for strategy in ("close", "mid", "far", "rand"):
        assert not (select(contexts, strategy)[1] == np.arange(40)).any()


# ---- ties ------------------------------------------------------------------------------------------------------------

def test_the_lowest_index_wins_among_exact_ties():
    contexts = np.repeat(random_contexts(1), 7, axis=0)
    for strategy in ("close", "mid", "far"):
        assert select(contexts, strategy)[1].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_cosines_within_1e_12_are_ties():
    # Cosines to the first context differ by 8e-13, three times 3e-13 of angle at a slope of sin(1): the closest stands last.
    contexts = at_angles(0.0, 1 + 9e-13, 1 + 6e-13, 1 + 3e-13, 1.0)
    assert select(contexts, "close")[1][0] == select(contexts, "far")[1][0] == select(contexts, "mid")[1][0] == 1
    contexts = at_angles(0.0, 1 + 3e-11, 1 + 2e-11, 1 + 1e-11, 1.0)  # 8e-12 from one to the next
    assert select(contexts, "close")[1][0] == 4
    assert select(contexts, "far")[1][0] == 1
    assert select(contexts, "mid")[1][0] == 2


def test_near_ties_below_float32_are_decided_in_float64():
    # Angles to the first context differ by 1e-9, far below what float32 cosines resolve; the closest stands last.
    contexts = at_angles(0.0, 1 + 3e-9, 1 + 2e-9, 1 + 1e-9, 1.0)
    assert select(contexts, "close")[1][0] == 4
    assert select(contexts, "far")[1][0] == 1
    assert select(contexts, "mid")[1][0] == 2


# ---- what must not matter --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_block_size_changes_nothing(strategy, monkeypatch):
    contexts = with_duplicates_and_antipodes(150)
    whole = select(contexts, strategy, pool=100)
    monkeypatch.setattr(identity_contexts, "BLOCK_BYTES", 8 * 100 * 7)  # 7 rows a block
    blocked = select(contexts, strategy, pool=100)
    for before, after in zip(whole, blocked, strict=True):
        assert np.array_equal(before, after, equal_nan=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_directions_count(strategy):
    contexts = random_contexts(60)
    scaled = contexts * np.linspace(0.1, 30, 60)[:, None]
    _, index, similarity = select(contexts, strategy)
    _, scaled_index, scaled_similarity = select(scaled, strategy)
    assert np.array_equal(index, scaled_index)
    np.testing.assert_allclose(scaled_similarity, similarity, atol=1e-6)


# ---- rand, null ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pool", [0, 2, 5])
def test_rand_is_seeded_uniform_over_the_others_of_the_pool_and_never_oneself(pool):
    contexts = random_contexts(8)
    draws = np.stack([select(contexts, "rand", seed=seed, pool=pool)[1] for seed in range(2000)])
    assert not np.any(draws == np.arange(8))
    for row in range(8):
        others = np.setdiff1d(np.arange(pool or 8), row)
        values, counts = np.unique(draws[:, row], return_counts=True)
        assert np.array_equal(values, others)
        expected = 2000 / len(others)
        assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))
    vectors, index, similarity = select(contexts, "rand", seed=7, pool=pool)
    assert np.array_equal(index, draws[7]) and np.array_equal(vectors, contexts[index])
    assert np.allclose(similarity, brute_force(contexts)[np.arange(8), index], atol=1e-6)


def test_rand_is_not_the_previous_identity():
    index = select(random_contexts(1000), "rand")[1]
    assert np.mean(index == (np.arange(1000) - 1) % 1000) < 0.02
    assert len(np.unique(index)) > 500


def test_null_is_the_zero_vector_without_index_and_similarity():
    vectors, index, similarity = select(random_contexts(4), "null")
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32 and not vectors.any()
    assert index.tolist() == [-1] * 4 and np.isnan(similarity).all()


# ---- vectors that are no identity ------------------------------------------------------------------------------------

def test_average_is_the_mean_direction_of_the_others():
    contexts = np.array([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]])  # the second is of norm 2, and counts no more than the others
    vectors, index, similarity = select(contexts, "average")
    # (0, 1) + (0.6, 0.8), (1, 0) + (0.6, 0.8) and (1, 0) + (0, 1), each divided by its norm
    expected = [np.array([0.6, 1.8]) / 3.6**0.5, np.array([1.6, 0.8]) / 3.2**0.5, np.array([1.0, 1.0]) / 2**0.5]
    assert vectors.dtype == np.float32 and index.tolist() == [-1, -1, -1]
    np.testing.assert_allclose(vectors, expected, atol=1e-7)
    np.testing.assert_allclose(similarity, [0.6 / 3.6**0.5, 0.8 / 3.2**0.5, 1.4 / 2**0.5], atol=1e-7)


def test_average_is_that_of_the_pool():
    contexts = np.array([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8], [-1.0, 0.0]])
    vectors = select(contexts, "average", pool=2)[0]
    expected = [[0, 1], [1, 0], np.array([1, 1]) / 2**0.5, np.array([1, 1]) / 2**0.5]
    np.testing.assert_allclose(vectors, expected, atol=1e-7)


def test_an_average_without_a_direction_is_refused():
    cancelling = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    with pytest.raises(UserError, match="negatives.strategy: average has no direction for the context in row 1, .*; choose"):
        select(cancelling, "average")
    assert select(cancelling, "average", pool=2)[1].tolist() == [-1, -1, -1]


def test_antipode_is_the_negated_context():
    contexts = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, -2.0]])
    vectors, index, similarity = select(contexts, "antipode", pool=2)
    assert vectors.dtype == np.float32 and np.array_equal(vectors, -contexts.astype(np.float32))
    assert index.tolist() == [-1, -1, -1]
    np.testing.assert_allclose(similarity, [-1, -1, -1], atol=1e-7)


# ---- the registry ----------------------------------------------------------------------------------------------------

def test_strategies_are_a_plain_dict_of_indices_or_vectors():
    assert type(STRATEGIES) is dict
    assert list(STRATEGIES) == ["close", "mid", "far", "rand", "null", "average", "antipode"]
    dimensions = [strategy(random_contexts(9), 9, 0).ndim for strategy in STRATEGIES.values()]
    assert dimensions == [1, 1, 1, 1, 2, 2, 2]


def test_a_new_strategy_is_one_entry(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "next", lambda contexts, pool, seed: (np.arange(len(contexts)) + 1) % pool)
    contexts = random_contexts(5)
    vectors, index, similarity = select(contexts, "next")
    assert index.tolist() == [1, 2, 3, 4, 0] and np.array_equal(vectors, contexts[[1, 2, 3, 4, 0]])
    assert np.allclose(similarity, (contexts * vectors).sum(axis=1), atol=1e-6)


# ---- refused ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pool", [1, 11])
def test_a_pool_without_another_identity_is_refused(pool):
    with pytest.raises(UserError, match=f"negatives.pool: {pool} of 10"):
        select(random_contexts(10), "far", pool=pool)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_contexts_without_a_direction_are_refused(value):
    contexts = random_contexts(5)
    contexts[3] = value
    with pytest.raises(UserError, match="row 3"):
        select(contexts, "far")


# ---- custom ----------------------------------------------------------------------------------------------------------

IDS = ["ann", "bob", "eve, jr"]


def test_custom_takes_the_negatives_of_the_csv(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('identity,negative\n"eve, jr",ann\nann, bob\n\nbob,"eve, jr"\n', encoding="utf-8-sig")
    custom = negatives.read_custom(file, IDS)
    assert custom.tolist() == [1, 2, 0]
    contexts = random_contexts(3)
    vectors, index, similarity = negatives.from_choice(contexts, custom)
    assert index.tolist() == [1, 2, 0] and index.dtype == np.int64
    assert np.array_equal(vectors, contexts[[1, 2, 0]])
    assert np.allclose(similarity, (contexts * contexts[[1, 2, 0]]).sum(1), atol=1e-6)


@pytest.mark.parametrize("text, words", [
    ("ann,bob\nbob,zoe\n", ":2: there is no identity 'zoe'"),
    ("ann,bob\nbob,bob\n", ":2: 'bob' is its own negative"),
    ("ann,bob\nann,bob\n", ":2: 'ann' has a negative already"),
    ("identity,negative\nann\n", ":2: has 1 fields"),
    ("ann,bob\nbob,ann\n", "has no line for 'eve, jr' \\(1 identities"),
    ("", "has no line for 'ann' \\(3 identities"),
    (b"ann,b\xf8b\n", ": is not UTF-8 \\(invalid start byte at byte 5\\); save the CSV as UTF-8"),
    ("ann,bob\n".encode("utf-16"), ": is not UTF-8 \\(invalid start byte at byte 0\\); save the CSV as UTF-8"),
    ("ann,bob\nbob," + "x" * 140_000, ":2: field larger than field limit \\(131072\\); write identity,negative"),
    ('ann,bob\n"bob\n' + "x\n" * 70_000, ": field larger than field limit"),
    ("ann,bo\0b\n", ":1: there is no identity 'bo.x00b'"),
    ("ann," + "x" * 100_000, ":1: there is no identity 'x{200}' in"),
])
def test_a_wrong_custom_file_is_refused_with_its_line(tmp_path, text, words):
    file = tmp_path / "pairs.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        negatives.read_custom(file, IDS)


def test_custom_names_are_the_same_in_either_unicode_form(tmp_path):
    (tmp_path / "pairs.csv").write_text("José,Ann\nAnn,José\n".replace("é", "e\u0301"), encoding="utf-8")
    assert negatives.read_custom(tmp_path / "pairs.csv", ["Ann", "José"]).tolist() == [1, 0]


def test_a_missing_custom_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv: no such file"):
        negatives.read_custom(tmp_path / "nowhere.csv", IDS)


# ---- files -----------------------------------------------------------------------------------------------------------

def written(tmp_path, strategy="far"):
    contexts = random_contexts(3)
    digest = identity_contexts.digest(IDS, contexts)
    chosen = select(contexts, strategy)
    file = tmp_path / "negatives.npz"
    negatives.write(file, IDS, *chosen, digest)
    return file, digest, chosen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_written_is_read(tmp_path, strategy):
    file, digest, (vectors, index, similarity) = written(tmp_path, strategy)
    again = negatives.read(file, IDS, 32, digest)
    assert np.array_equal(again, vectors) and again.dtype == np.float32
    with np.load(file, allow_pickle=False) as arrays:
        assert {name: arrays[name].dtype.kind for name in arrays} == {
            "ids": "U", "negatives": "f", "index": "i", "similarity": "f", "contexts_digest": "U"}
        assert arrays["ids"].tolist() == IDS and np.array_equal(arrays["index"], index)
        assert np.array_equal(arrays["similarity"], similarity, equal_nan=True)


def test_negatives_of_other_contexts_are_refused(tmp_path):
    file, *_ = written(tmp_path)
    others = [(IDS, random_contexts(3, seed=1)), (["ann", "bob", "kim"], random_contexts(3)),
              (IDS[:2], random_contexts(2))]
    for ids, contexts in others:
        with pytest.raises(UserError, match="negatives.npz: holds negatives of other contexts.*; delete it"):
            negatives.read(file, ids, 32, identity_contexts.digest(ids, contexts))


def test_negatives_under_other_ids_are_refused(tmp_path):
    file, digest, chosen = written(tmp_path)
    negatives.write(file, ["ann", "bob", "kim"], *chosen, digest)
    with pytest.raises(UserError, match="holds negatives of other contexts"):
        negatives.read(file, IDS, 32, digest)


@pytest.mark.parametrize("vectors", [np.ones((2, 32)), np.ones((3, 31)), np.ones(3), np.full((3, 32), np.nan),
                                     np.full((3, 32), np.inf)], ids=["two", "narrow", "flat", "nan", "infinite"])
def test_negatives_that_no_stage_could_use_are_refused(tmp_path, vectors):
    file, digest, (_, index, similarity) = written(tmp_path)
    negatives.write(file, IDS, vectors, index, similarity, digest)
    with pytest.raises(UserError, match="negatives.npz: does not hold a finite negative for each identity; delete it"):
        negatives.read(file, IDS, 32, digest)


def test_negatives_of_another_type_are_refused(tmp_path):
    file, digest, (vectors, *_) = written(tmp_path)
    np.savez(file, ids=np.array(IDS), negatives=vectors.astype(np.float64), contexts_digest=np.array(digest))
    with pytest.raises(UserError, match="does not hold a finite negative"):
        negatives.read(file, IDS, 32, digest)


def test_damaged_missing_and_older_files_are_refused(tmp_path):
    file, digest, *_ = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="negatives.npz: is not a readable .npz"):
        negatives.read(file, IDS, 32, digest)
    with pytest.raises(UserError, match="create_negative_contexts.py"):
        negatives.read(tmp_path / "none.npz", IDS, 32, digest)
    np.savez(file, ids=np.array(IDS), index=np.array([1, 2, 0]), contexts_digest=np.array(digest))
    with pytest.raises(UserError, match="negatives.npz: holds no array 'negatives'; delete it"):
        negatives.read(file, IDS, 32, digest)


def test_damaged_custom_files_are_read_or_refused(tmp_path):
    file = tmp_path / "pairs.csv"
    check_reader(file, b'identity,negative\n"eve, jr",ann\nann, bob\n\nbob,"eve, jr"\n', lambda: negatives.read_custom(file, IDS))


@pytest.mark.parametrize("strategy", ["far", "null"])
def test_damaged_negatives_are_read_or_refused(tmp_path, strategy):
    file, digest, _ = written(tmp_path, strategy)
    check_reader(file, file.read_bytes(), lambda: negatives.read(file, IDS, 32, digest))
