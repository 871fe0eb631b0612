"""Negatives against float64 brute force over explicit cosines."""
import numpy as np
import pytest

from utils.identities import contexts as identity_contexts
from utils.identities import negatives
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


def brute_force(contexts: np.ndarray, pool: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """All cosines in float64 and, for each identity, the others in the pool in rising order of their cosine."""
    exact = contexts.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = exact @ exact.T
    rising = []
    for row in range(len(contexts)):
        others = np.setdiff1d(np.arange(pool or len(contexts)), row)
        rising.append(others[np.argsort(cosines[row, others], kind="stable")])
    return cosines, rising


RANK = {"close": lambda others: others - 1, "mid": lambda others: (others - 1) // 2, "far": lambda others: 0}


@pytest.mark.parametrize("strategy", RANK)
@pytest.mark.parametrize("number, dimension, pool", [(2, 32, 0), (3, 32, 0), (4, 2, 0), (101, 32, 0), (500, 2, 0),
                                                     (1000, 64, 300), (2000, 512, 0)])
def test_ranked_strategies_equal_float64_brute_force(strategy, number, dimension, pool):
    contexts = random_contexts(number, dimension) if number < 100 else with_duplicates_and_antipodes(number, dimension)
    index, similarity = negatives.select(contexts, strategy, pool=pool)
    cosines, rising = brute_force(contexts, pool)
    assert index.dtype == np.int64 and similarity.dtype == np.float32
    assert not np.any(index == np.arange(number))
    for row, others in enumerate(rising):
        rank = RANK[strategy](len(others))
        ordered = cosines[row, others]
        assert abs(similarity[row] - ordered[rank]) < 1e-6
        assert abs(cosines[row, index[row]] - ordered[rank]) < 1e-12
        neighbours = np.delete(ordered[max(rank - 1, 0) : rank + 2], min(rank, 1))
        if np.all(np.abs(neighbours - ordered[rank]) > 1e-6):
            assert index[row] == others[rank]


@pytest.mark.parametrize("number, rank", [(5, 1), (6, 2)])
def test_mid_is_the_lower_median_of_the_others(number, rank):
    # 4 others have ranks 0 to 3 and two medians, 1 and 2; 5 others have the one median 2.
    angles = np.array([0.0, 0.3, 0.7, 1.2, 1.8, 2.5][:number])
    contexts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    index, similarity = negatives.select(contexts, "mid")
    assert index[0] == number - 1 - rank  # cosines to the first context fall with the angle
    assert similarity[0] == pytest.approx(np.cos(angles[index[0]]), abs=1e-7)


def test_an_identity_may_get_its_duplicate_but_never_itself():
    contexts = with_duplicates_and_antipodes(40)
    index, similarity = negatives.select(contexts, "close")
    assert (index[1], index[20], index[39]) == (20, 1, 1)
    assert similarity[1] == similarity[20] == 1
    index, similarity = negatives.select(contexts, "far")
    assert index[1] == index[20] == index[39] == 38
    assert index[2] == 3 and similarity[2] == -1


def test_the_lowest_index_wins_among_exact_ties():
    contexts = np.repeat(random_contexts(1), 7, axis=0)
    for strategy in ("close", "mid", "far"):
        assert negatives.select(contexts, strategy)[0].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_near_ties_below_float32_are_decided_in_float64():
    # Angles to the first context differ by 1e-9, far below what float32 cosines resolve; the closest stands last.
    angles = np.array([0.0, 1 + 3e-9, 1 + 2e-9, 1 + 1e-9, 1.0])
    contexts = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert negatives.select(contexts, "close")[0][0] == 4
    assert negatives.select(contexts, "far")[0][0] == 1
    assert negatives.select(contexts, "mid")[0][0] == 2


@pytest.mark.parametrize("strategy", ["close", "mid", "far", "rand"])
def test_the_block_size_changes_nothing(strategy, monkeypatch):
    contexts = with_duplicates_and_antipodes(150)
    whole = negatives.select(contexts, strategy, pool=100)
    monkeypatch.setattr(identity_contexts, "BLOCK_BYTES", 4 * 100 * 7)
    monkeypatch.setattr(negatives, "BLOCK_BYTES", 16 * 32 * 7)
    blocked = negatives.select(contexts, strategy, pool=100)
    assert np.array_equal(whole[0], blocked[0]) and np.array_equal(whole[1], blocked[1])


def test_only_directions_count():
    contexts = random_contexts(60)
    scaled = contexts * np.linspace(0.1, 30, 60)[:, None]
    assert np.array_equal(negatives.select(contexts, "mid")[0], negatives.select(scaled, "mid")[0])


@pytest.mark.parametrize("pool", [0, 2, 5])
def test_rand_is_seeded_uniform_over_the_others_of_the_pool_and_never_oneself(pool):
    contexts = random_contexts(8)
    draws = np.stack([negatives.select(contexts, "rand", seed=seed, pool=pool)[0] for seed in range(2000)])
    assert not np.any(draws == np.arange(8))
    for row in range(8):
        others = np.setdiff1d(np.arange(pool or 8), row)
        values, counts = np.unique(draws[:, row], return_counts=True)
        assert np.array_equal(values, others)
        expected = 2000 / len(others)
        assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))
    again = negatives.select(contexts, "rand", seed=7, pool=pool)
    assert np.array_equal(again[0], draws[7])
    cosines, _ = brute_force(contexts)
    assert np.allclose(again[1], cosines[np.arange(8), again[0]], atol=1e-6)


def test_rand_is_not_the_previous_identity():
    index, _ = negatives.select(random_contexts(1000), "rand")
    assert np.mean(index == (np.arange(1000) - 1) % 1000) < 0.02
    assert len(np.unique(index)) > 500


def test_null_is_index_minus_one_without_a_similarity():
    index, similarity = negatives.select(random_contexts(4), "null")
    assert index.tolist() == [-1] * 4 and np.isnan(similarity).all()


@pytest.mark.parametrize("pool", [1, 11])
def test_a_pool_without_another_identity_is_refused(pool):
    with pytest.raises(UserError, match=f"negatives.pool: {pool} of 10"):
        negatives.select(random_contexts(10), "far", pool=pool)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_contexts_without_a_direction_are_refused(value):
    contexts = random_contexts(5)
    contexts[3] = value
    with pytest.raises(UserError, match="row 3"):
        negatives.select(contexts, "far")


# ---- custom ----------------------------------------------------------------------------------------------------------

CHOSEN_BY = {"pool": 5, "seed": 0}
IDS = ["ann", "bob", "eve, jr"]


def test_custom_takes_the_negatives_of_the_csv(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('identity,negative\n"eve, jr",ann\nann, bob\n\nbob,"eve, jr"\n', encoding="utf-8-sig")
    custom = negatives.read_custom(file, IDS)
    assert custom.tolist() == [1, 2, 0]
    contexts = random_contexts(3)
    index, similarity = negatives.select(contexts, "custom", custom=custom)
    assert index.tolist() == [1, 2, 0]
    assert np.allclose(similarity, (contexts * contexts[[1, 2, 0]]).sum(1), atol=1e-6)


@pytest.mark.parametrize("text, words", [
    ("ann,bob\nbob,zoe\n", ":2: there is no identity 'zoe'"),
    ("ann,bob\nbob,bob\n", ":2: 'bob' is its own negative"),
    ("ann,bob\nann,bob\n", ":2: 'ann' has a negative already"),
    ("identity,negative\nann\n", ":2: has 1 fields"),
    ("ann,bob\nbob,ann\n", "has no line for 'eve, jr' \\(1 identities"),
    ("", "has no line for 'ann' \\(3 identities"),
    (b"ann,b\xf8b\n", ":1: there is no identity 'b\ufffdb'"),
])
def test_a_wrong_custom_file_is_refused_with_its_line(tmp_path, text, words):
    file = tmp_path / "pairs.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        negatives.read_custom(file, IDS)


def test_a_missing_custom_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv: no such file"):
        negatives.read_custom(tmp_path / "nowhere.csv", IDS)


# ---- files -----------------------------------------------------------------------------------------------------------

def written(tmp_path, strategy="far"):
    contexts = random_contexts(3)
    digest = identity_contexts.digest(IDS, contexts)
    index, similarity = negatives.select(contexts, strategy)
    file = tmp_path / "negatives.npz"
    negatives.write(file, IDS, index, similarity, digest, CHOSEN_BY)
    return file, digest, index, similarity


@pytest.mark.parametrize("strategy", ["far", "null"])
def test_what_is_written_is_read(tmp_path, strategy):
    file, digest, index, similarity = written(tmp_path, strategy)
    again = negatives.read(file, digest, IDS, CHOSEN_BY)
    assert np.array_equal(again[0], index) and np.array_equal(again[1], similarity, equal_nan=True)


def test_negatives_of_other_contexts_are_refused(tmp_path):
    file, *_ = written(tmp_path)
    others = [(IDS, random_contexts(3, seed=1)), (["ann", "bob", "kim"], random_contexts(3)),
              (IDS[:2], random_contexts(2))]
    for ids, contexts in others:
        with pytest.raises(UserError, match="negatives.npz: holds negatives of other contexts.*; delete it"):
            negatives.read(file, identity_contexts.digest(ids, contexts), ids, CHOSEN_BY)


@pytest.mark.parametrize("index", [[1, 1, 0], [1, 3, 0], [-2, 0, 0], [1, 0]])
def test_negatives_that_name_oneself_or_nobody_are_refused(tmp_path, index):
    file, digest, _, similarity = written(tmp_path)
    negatives.write(file, IDS, np.array(index), similarity, digest, CHOSEN_BY)
    with pytest.raises(UserError, match="does not name another identity"):
        negatives.read(file, digest, IDS, CHOSEN_BY)


def test_damaged_and_missing_files_are_refused(tmp_path):
    file, digest, *_ = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="negatives.npz: is not a readable .npz"):
        negatives.read(file, digest, IDS, CHOSEN_BY)
    with pytest.raises(UserError, match="create_negative_contexts.py"):
        negatives.read(tmp_path / "none.npz", digest, IDS, CHOSEN_BY)


def test_negatives_made_with_other_settings_are_refused(tmp_path):
    file, digest, *_ = written(tmp_path)
    for other, word in (({"pool": 4}, "negatives.pool = 5, now it is 4"), ({"seed": 1}, "negatives.seed = 0")):
        with pytest.raises(UserError, match=word):
            negatives.read(file, digest, IDS, other)
    assert negatives.chosen_by("far", 7, 1) == {"pool": 7}
    assert negatives.chosen_by("rand", 7, 1) == {"pool": 7, "seed": 1}
    assert negatives.chosen_by("null", 7, 1) == negatives.chosen_by("custom", 7, 1) == {}
