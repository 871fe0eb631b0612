"""Beside which run which row of the paper stands."""
import pytest

from utils.evaluation.paper import score_row
from utils.runtime.files import write_json


@pytest.mark.parametrize("guidance, strategy, row", [
    ({"w": 0, "schedule": "constant"}, "far", "w = 0"), ({"w": 0.5, "schedule": "constant"}, "far", "far"),
    ({"w": 0.5, "schedule": "constant", "rule": "negative"}, "mid", "mid"), ({"w": 1.0, "schedule": "constant"}, "far", None),
    ({"w": 0.5, "schedule": "linear"}, "far", None), ({"w": 0.5, "schedule": "constant", "rule": "apg"}, "far", None),
    ({"w": 0.5, "schedule": "constant", "rule": "negative"}, "antipode", None)])
def test_the_paper_s_row_stands_only_beside_its_own_settings(tmp_path, guidance, strategy, row):
    write_json(tmp_path / "run.json", {"config": {"guidance": guidance, "negatives": {"strategy": strategy}}})
    assert score_row(tmp_path) == row
    write_json(tmp_path / "run.json", {"config": {"guidance": guidance, "negatives": {"strategy": strategy}},
                                       "decides": {"guidance.w": 0.5, "variety.cone": 0.7}})
    assert score_row(tmp_path) is None


@pytest.mark.parametrize("images, row", [("data/lfw/lfw-deepfunneled", "LFW, real"), ("/somewhere/lfw/", "LFW, real"),
                                         ("data/my-photos", None), ("data/lfw/mine", None)])
def test_a_run_without_samples_is_lfw_by_the_images_that_were_aligned(tmp_path, images, row):
    write_json(tmp_path / "aligned" / "align.json", {"format": 2, "decides": {"align.images": images}})
    assert score_row(tmp_path) == row
