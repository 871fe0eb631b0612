"""Score distributions against every pair in explicit float64, and the rates against scikit-learn's ROC curve."""
import os
import tarfile
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from models.backbones import build
from utils.evaluation import scores
from utils.evaluation.scores import (
    BINS,
    BOOTSTRAP_BINS,
    ScoreDistributions,
    bootstrap,
    interval,
    metrics,
    most_similar_identities,
    read_distributions,
    score_distributions,
    unit_rows,
)
from utils.runtime.errors import UserError
from utils.runtime.files import write_npz

SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / ".." / "shared"))
LFW = SHARED / "data" / "lfw" / "lfw-deepfunneled.tar"
CASIA = SHARED / "data" / "recognisers" / "mobilefacenet_casia.ckpt"


def intervals_of(embeddings, labels, **arguments):
    return {name: interval(values) for name, values in bootstrap(embeddings, labels, **arguments).items()}


def faces(identities=40, images=8, dimension=32, noise=1.2, seed=0):
    """Embeddings around one centre an identity, in shuffled order, of any norm; float32, and names as labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(identities, 1, dimension)) + noise * rng.normal(size=(identities, images, dimension))
    x = x.reshape(-1, dimension) * rng.uniform(0.5, 20, size=(identities * images, 1))
    labels = np.repeat([f"person {k}" for k in range(identities)], images)
    order = rng.permutation(len(x))
    return x[order].astype(np.float32), labels[order]


def explicit_pairs(x, labels):
    """Genuine and impostor cosines, one pair at a time."""
    x = x.astype(np.float64)
    kinds = {True: [], False: []}
    for i, j in combinations(range(len(x)), 2):
        kinds[bool(labels[i] == labels[j])].append(x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])))
    return np.array(kinds[True]), np.array(kinds[False])


def roc_rates(genuine, impostor):
    """EER (linear between the curve's points), FMR100 and FMR1000 from scikit-learn."""
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    fpr, tpr, _ = roc_curve(truth, np.r_[genuine, impostor], drop_intermediate=False)
    eer = brentq(lambda fmr: 1 - fmr - interp1d(fpr, tpr)(fmr), 0, 1, xtol=1e-14)
    return {"eer": eer, "fmr100": (1 - tpr)[fpr <= 0.01].min(), "fmr1000": (1 - tpr)[fpr <= 0.001].min()}


@pytest.fixture(scope="module", params=[0.8, 1.2, 2.5], ids=["apart", "touching", "mixed"])
def measured(request):
    x, labels = faces(noise=request.param)
    return score_distributions(x, labels), *explicit_pairs(x, labels)


def test_counts_and_moments_equal_those_of_explicit_pairs(measured):
    distributions, genuine, impostor = measured
    row = metrics(distributions)
    assert (row["genuine_pairs"], row["impostor_pairs"]) == (len(genuine), len(impostor))
    for kind, values in (("genuine", genuine), ("impostor", impostor)):
        assert row[f"{kind}_mean"] == pytest.approx(values.mean(), abs=1e-9)
        assert row[f"{kind}_std"] == pytest.approx(values.std(), abs=1e-9)
    fdr = (genuine.mean() - impostor.mean()) ** 2 / (genuine.var() + impostor.var())
    assert row["fdr"] == pytest.approx(fdr, abs=1e-6)


def test_histograms_and_rates_equal_those_of_scores_binned_the_same_way(measured):
    distributions, genuine, impostor = measured
    binned = [np.floor((values + 1) * (BINS / 2)).astype(int) for values in (genuine, impostor)]
    np.testing.assert_array_equal(distributions.genuine_counts, np.bincount(binned[0], minlength=BINS))
    np.testing.assert_array_equal(distributions.impostor_counts, np.bincount(binned[1], minlength=BINS))
    row = metrics(distributions)
    for name, expected in roc_rates(*binned).items():
        assert row[name] == pytest.approx(expected, abs=1e-12)


def test_rates_are_those_of_the_raw_scores(measured):
    distributions, genuine, impostor = measured
    row = metrics(distributions)
    for name, expected in roc_rates(genuine, impostor).items():
        assert row[name] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not (LFW.is_file() and CASIA.is_file()), reason="LFW and the pretrained MobileFaceNet are not here")
def test_embeddings_of_lfw_are_measured_as_by_explicit_pairs():
    people = defaultdict(list)
    with tarfile.open(LFW) as tar:
        for member in (entry for entry in tar if entry.isfile()):
            if sum(map(len, people.values())) == 100:
                break
            jpeg = cv2.imdecode(np.frombuffer(tar.extractfile(member).read(), np.uint8), cv2.IMREAD_COLOR_RGB)
            # Not aligned, but near enough to the template for embeddings like real ones.
            people[Path(member.name).parent.name].append(cv2.resize(jpeg[59:191, 59:191], (112, 112)))
    labels = [name for name, crops in people.items() for _ in crops]
    crops = torch.from_numpy(np.stack([crop for crops in people.values() for crop in crops])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        recogniser = build(torch.load(CASIA, map_location="cpu", weights_only=True)["net_state_dict"])
        x = recogniser(crops / 127.5 - 1).numpy()
    genuine, impostor = explicit_pairs(x, labels)
    row = metrics(score_distributions(x, labels))
    assert (row["genuine_pairs"], row["impostor_pairs"]) == (len(genuine), len(impostor))
    assert row["genuine_std"] == pytest.approx(genuine.std(), abs=1e-9)
    assert row["impostor_mean"] == pytest.approx(impostor.mean(), abs=1e-9)
    fdr = (genuine.mean() - impostor.mean()) ** 2 / (genuine.var() + impostor.var())
    assert row["fdr"] == pytest.approx(fdr, abs=1e-6)
    for name, expected in roc_rates(genuine, impostor).items():
        assert row[name] == pytest.approx(expected, abs=1e-3)


def test_a_miss_of_the_fmr_by_one_pair_counts():
    # 200 impostors: FMR <= 1% lets two match. The genuine scores lie between the second and third highest impostor.
    counts = np.zeros((2, BINS), dtype=np.int64)
    counts[0, [100, 150, 250]] = 1, 1, 2
    counts[1, [10, 200, 300]] = 197, 1, 2
    row = metrics(ScoreDistributions(counts[0], counts[1], 0.5, 0.1, 0.0, 0.1))
    assert row["fmr100"] == 0.5
    assert row["fmr1000"] == 1.0


def test_blocks_of_any_size_give_the_same_distributions(monkeypatch):
    x, labels = faces(identities=6, images=5)
    whole = score_distributions(x, labels)
    for block in (1, 4, 64):
        monkeypatch.setattr(scores, "BLOCK", block)
        in_blocks = score_distributions(x, labels)
        np.testing.assert_array_equal(in_blocks.genuine_counts, whole.genuine_counts)
        np.testing.assert_array_equal(in_blocks.impostor_counts, whole.impostor_counts)
        assert in_blocks.genuine_std == pytest.approx(whole.genuine_std, abs=1e-12)


# ---- degenerate input ------------------------------------------------------------------------------------------------

def test_all_scores_equal_is_no_separation():
    row = metrics(score_distributions(np.ones((6, 5)), [0, 0, 1, 1, 2, 2]))
    assert row["eer"] == pytest.approx(0.5)
    assert (row["fmr100"], row["fmr1000"], row["fdr"]) == (1.0, 1.0, 0.0)
    assert row["genuine_mean"] == pytest.approx(1) and row["genuine_std"] == pytest.approx(0, abs=1e-7)
    assert (row["genuine_pairs"], row["impostor_pairs"]) == (3, 12)


def test_ties_between_genuine_and_impostor_scores_follow_the_roc_curve():
    x = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]], dtype=float)
    labels = [0, 0, 0, 1, 1, 1]
    row = metrics(score_distributions(x, labels))
    expected = roc_rates(*explicit_pairs(x, labels))
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert 0 < row["eer"] < 1


def test_two_identities_are_enough():
    row = metrics(score_distributions([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], ["a", "a", "b", "b"]))
    assert (row["genuine_pairs"], row["impostor_pairs"]) == (2, 4)
    assert (row["eer"], row["fmr100"]) == (0, 0)


def test_identities_with_one_image_make_impostor_pairs_only():
    row = metrics(score_distributions(np.eye(4) + 0.1 * np.arange(4), [0, 1, 1, 2]))
    assert (row["genuine_pairs"], row["impostor_pairs"]) == (1, 5)

def test_the_most_similar_identities_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 6)
    x, labels = faces(identities=20)
    means = {name: unit_rows(x)[labels == name].mean(axis=0) for name in np.unique(labels)}
    cosines = {frozenset(pair): means[pair[0]] @ means[pair[1]] / np.prod([np.linalg.norm(means[k]) for k in pair])
               for pair in combinations(means, 2)}
    a, b, cosine = most_similar_identities(x, labels)
    assert frozenset((a, b)) == max(cosines, key=cosines.get)
    assert cosine == pytest.approx(max(cosines.values()), abs=1e-12)


def test_distributions_survive_a_file(tmp_path):
    distributions = score_distributions(*faces(identities=5))
    write_npz(tmp_path / "histograms.npz", **vars(distributions))
    assert metrics(read_distributions(tmp_path / "histograms.npz")) == metrics(distributions)


# ---- bootstrap -------------------------------------------------------------------------------------------------------

def interpolated_rates(genuine, impostor):
    """EER, FMR100 and FMR1000 on the polyline of scikit-learn's ROC curve, of scores in the bootstrap's bins."""
    binned = [np.floor((values + 1) * (BOOTSTRAP_BINS / 2)) for values in (genuine, impostor)]
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [len(genuine), len(impostor)]), np.concatenate(binned),
                            drop_intermediate=False)
    return {"eer": roc_rates(*binned)["eer"], "fmr100": np.interp(0.01, fpr, 1 - tpr),
            "fmr1000": np.interp(0.001, fpr, 1 - tpr)}


def test_intervals_equal_those_of_resampled_explicit_pairs():
    x, labels = faces(identities=12, images=5, noise=1.6, seed=3)
    x[labels == "person 3"] *= -1  # names of a different order than the rows, and one odd identity
    names = np.unique(labels)
    drawn = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=40)
    rows = []
    for times in drawn:
        genuine, impostor = [], []
        for a, b in combinations(range(len(x)), 2):
            m, n = (int(np.flatnonzero(names == labels[k])[0]) for k in (a, b))
            score = x[a] @ x[b] / np.linalg.norm(x[a]) / np.linalg.norm(x[b])
            if m == n:
                genuine += [score] * times[m]
            else:
                impostor += [score] * (times[m] * times[n])
        g, i = np.array(genuine, dtype=np.float64), np.array(impostor, dtype=np.float64)
        rows.append(interpolated_rates(g, i) | {"fdr": (g.mean() - i.mean()) ** 2 / (g.var() + i.var()),
                                                "genuine_mean": g.mean(), "genuine_std": g.std(),
                                                "impostor_mean": i.mean(), "impostor_std": i.std()})
    intervals = intervals_of(x, labels, replicates=40, seed=7)
    assert intervals.keys() == rows[0].keys()
    for name, limits in intervals.items():
        assert limits == pytest.approx(np.quantile([row[name] for row in rows], (0.05, 0.95)), abs=1e-6), name


def test_intervals_hold_the_estimate_and_shrink_with_more_identities():
    widths = []
    for identities in (15, 120):
        x, labels = faces(identities=identities, images=4, noise=1.6)
        row, intervals = metrics(score_distributions(x, labels)), intervals_of(x, labels, replicates=200)
        assert all(intervals[name][0] <= row[name] <= intervals[name][1] for name in ("eer", "fmr100", "fdr"))
        widths.append(intervals["fdr"][1] - intervals["fdr"][0])
    assert widths[1] < widths[0] / 1.5


def test_intervals_depend_on_the_seed_alone():
    x, labels = faces(identities=10, images=3)
    once = intervals_of(x, labels, replicates=50, seed=1)
    assert intervals_of(x, labels, replicates=50, seed=1) == once
    assert intervals_of(x, labels, replicates=50, seed=2) != once


def test_without_a_genuine_pair_nothing_is_scored():
    with pytest.raises(UserError, match="no genuine pair"):
        score_distributions(*faces(identities=12, images=1))
