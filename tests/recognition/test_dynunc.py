"""DynUnc against tables worked by hand."""
import re

import numpy as np
import pytest

from utils.recognition import dynunc
from utils.recognition.dynunc import dynamic_uncertainty, keep_list, open_probabilities, write_dynunc
from utils.runtime.errors import UserError

# Four epochs, windows of three. The standard deviations (ddof 1) of the two windows, by hand:
#   image 0: (.1 .2 .3) -> .1          (.2 .3 .4) -> .1                  mean .1
#   image 1: (.5 .5 .5) -> 0           (.5 .5 .8) -> sqrt(.03) = .173205 mean .0866025
#   image 2: (0 1 0)    -> sqrt(1/3)   (1 0 1)    -> sqrt(1/3)           mean .5773503
#   image 3: (.4 .4 .4) -> 0           (.4 .4 .4) -> 0                   mean 0
TABLE = np.array([[0.1, 0.5, 0.0, 0.4],
                  [0.2, 0.5, 1.0, 0.4],
                  [0.3, 0.5, 0.0, 0.4],
                  [0.4, 0.8, 1.0, 0.4]])
BY_HAND = [0.1, np.sqrt(0.03) / 2, np.sqrt(1 / 3), 0.0]


def test_scores_equal_the_table_worked_by_hand():
    np.testing.assert_allclose(dynamic_uncertainty(TABLE, window=3), BY_HAND, atol=1e-12)


def test_the_window_of_the_paper_is_ten_epochs():
    rng = np.random.default_rng(0)
    p = rng.random((14, 5))
    expected = [np.mean([np.std(p[j : j + 10, image], ddof=1) for j in range(5)]) for image in range(5)]
    np.testing.assert_allclose(dynamic_uncertainty(p), expected, atol=1e-12)


def test_an_epoch_that_did_not_show_the_image_is_left_out():
    # windows (.2 - .4): sqrt(.02);  (- .4 .4): 0
    p = np.array([[0.2], [np.nan], [0.4], [0.4]])
    np.testing.assert_allclose(dynamic_uncertainty(p, window=3), [np.sqrt(0.02) / 2], atol=1e-12)
    # windows (.2 - -): too few;  (- - .4): too few;  (- .4 .7): sqrt(.045)
    p = np.array([[0.2], [np.nan], [np.nan], [0.4], [0.7]])
    np.testing.assert_allclose(dynamic_uncertainty(p, window=3), [np.sqrt(0.045)], atol=1e-12)


def test_an_image_never_measured_is_refused_by_number():
    p = np.array([[0.1, 0.2], [0.3, np.nan], [0.5, np.nan]])
    with pytest.raises(UserError, match="image 1"):
        dynamic_uncertainty(p, window=2)


def test_a_memory_map_in_blocks_equals_the_whole(tmp_path, monkeypatch):
    p = np.random.default_rng(1).random((12, 50)).astype(np.float32)
    np.save(tmp_path / "p.npy", p)
    whole = dynamic_uncertainty(p, window=4)
    monkeypatch.setattr("utils.recognition.dynunc.COLUMN_BLOCK", 7)
    np.testing.assert_array_equal(dynamic_uncertainty(np.load(tmp_path / "p.npy", mmap_mode="r"), window=4), whole)


@pytest.mark.parametrize("window", [1, 5])
def test_a_window_that_does_not_fit_is_refused(window):
    with pytest.raises(UserError, match="window"):
        dynamic_uncertainty(TABLE, window)


def test_keep_lists_equal_the_table():
    scores = np.array(BY_HAND)
    assert keep_list(scores, 0.25).tolist() == [2]
    assert keep_list(scores, 0.5).tolist() == [0, 2]
    assert keep_list(scores, 0.75).tolist() == [0, 1, 2]
    assert keep_list(scores, 1.0).tolist() == [0, 1, 2, 3]
    assert keep_list(scores, 0.01).tolist() == [2]


def test_equal_scores_keep_the_first_images():
    assert keep_list(np.array([0.5, 0.1, 0.5, 0.5, 0.9]), 0.6).tolist() == [0, 2, 4]


# ---- files -----------------------------------------------------------------------------------------------------------

def test_a_longer_training_s_probabilities_keep_the_rows_of_the_shorter(tmp_path):
    file = tmp_path / "p.npy"
    p = open_probabilities(file, 2, 5, done=0)
    assert p.shape == (2, 5) and p.dtype == np.float32 and np.isnan(p).all()
    p[0] = np.arange(5)
    p.flush()
    grown = open_probabilities(file, 4, 5, done=1)
    np.testing.assert_array_equal(grown[0], np.arange(5))
    assert grown.shape == (4, 5) and np.isnan(grown[1:]).all()
    assert open_probabilities(file, 3, 5, done=1).shape == (4, 5)  # a shorter one loses nothing


@pytest.mark.parametrize("content, words", [
    (None, "lacks the probabilities of epochs"), (b"", "No data left|EOF"), (np.zeros((2, 4), np.float32), "float32 (2, 4)"),
    (np.zeros((2, 5)), "float64 (2, 5)"), (np.full((2, 5), np.nan, np.float32), "lacks the probabilities of epochs"),
    (np.array([[{}]], dtype=object), "dtype|object|Object")])
def test_probabilities_that_were_lost_or_damaged_are_refused(tmp_path, content, words):
    file = tmp_path / "p.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        open_probabilities(file, 4, 5, done=2)
    assert any(word in str(error.value) for word in words.split("|")) and "fr.name" in str(error.value)


def test_scores_and_keep_lists_are_written_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr(dynunc, "WINDOW", 3)
    monkeypatch.setattr(dynunc, "KEEP_FRACTIONS", (0.75, 0.5))
    paths = np.array(["a/0.png", "a/1.png", "b/0.png", "Zoë/0.png"])
    files = write_dynunc(tmp_path, TABLE, paths)
    assert [file.name for file in files] == ["keep_0.75.txt", "keep_0.5.txt"]
    assert files[0].read_text() == "a/0.png\na/1.png\nb/0.png\n" and files[1].read_text() == "a/0.png\nb/0.png\n"
    with np.load(tmp_path / "dynunc_scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], BY_HAND, atol=1e-12)
        assert saved["paths"].tolist() == paths.tolist()


def test_a_training_shorter_than_the_window_is_one_window(tmp_path):
    assert len(TABLE) < dynunc.WINDOW == 10 and dynunc.KEEP_FRACTIONS == (0.9, 0.75, 0.5)
    write_dynunc(tmp_path, TABLE, np.array(["a", "b", "c", "d"]))
    with np.load(tmp_path / "dynunc_scores.npz") as saved:
        np.testing.assert_allclose(saved["scores"], TABLE.std(axis=0, ddof=1), atol=1e-12)
