"""report.py: one page of runs, whatever the files in them are called and say."""
import json
import os
import shlex
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
from config.load import load_config
from tests.reporting.tiny_runs import HOSTILE, IMAGES, PEOPLE, REASON, write_run, write_runs
from tests.running import run
from utils.evaluation.scores import ScoreDistributions
from utils.faces.aligned import write_list
from utils.reporting import charts
from utils.reporting.gathering import Stage
from utils.reporting.page import digits
from utils.runtime.errors import UserError
from utils.runtime.files import write_json


class Page(HTMLParser):
    """Every element's name and attributes, and all text outside of scripts and styles."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements, self.text, self._inside = [], "", ""
        self.feed(file.read_text(encoding="utf-8", errors="replace"))

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def page(output) -> Page:
    run(report, *write_runs(output), f"paths.output={output}")
    return Page(output / "set" / "report.html")


def test_what_files_say_is_text_and_nothing_else(page):
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on") or name == "onerror"]
    assert not [attributes for attributes in page.all("b") + page.all("i") if attributes.get("id") == "reason"]
    assert {attributes["src"][:23] for attributes in page.all("img")} == {"data:image/webp;base64,"}
    for name in HOSTILE:
        assert name in page.text and f"identity {name}, image 0, w0" in [attributes["alt"] for attributes in page.all("img")]
    assert REASON in page.text and "<i>2" in page.text and "49" not in HOSTILE[2]


def test_nothing_outside_of_the_runs_is_shown(page, output):
    """A list of failures that names another folder's image shows a placeholder."""
    assert "../../elsewhere" in page.text
    assert not [attributes for attributes in page.all("img") if "elsewhere" in attributes["alt"]]


def test_the_same_identities_in_every_run_and_w_0_first(page):
    alts = [attributes["alt"] for attributes in page.all("img")]
    for name in ("w0", "close", "far"):
        assert sum(alt.endswith(f", {name}") for alt in alts) >= len(PEOPLE) * IMAGES
    text = " ".join(page.text.split())
    assert "12 identities, 6 images of each" in text and "The people in these pictures do not exist." in text
    assert "without a negative context and with far and close negatives at w = 0.5" in text


def test_the_metrics_and_the_papers_rows(page, output):
    metrics = {name: json.loads((output / "set" / name / "scores/recogniser/metrics.json").read_text()) for name in ("w0", "far")}
    text = " ".join(page.text.split())
    assert f"{metrics['w0']['fdr']:.2f} → {metrics['far']['fdr']:.2f}" in text
    assert f"{metrics['far']['fdr'] / metrics['w0']['fdr']:.2f}" in text
    assert "genuine std coverage Vendi score" in text and "0.625 7.250" in text and "real faces 0.938" in text
    assert "paper: far 0.039 0.078 0.179 0.019 0.059 5.69 2.34 0.361 0.131" in text
    assert "87.65" in text and "paper: NegFaceDiff (CASIA) 98.98" in text
    assert f"cosine {metrics['far']['most_similar_identities'][2]:.3f}" in text
    assert "6 of 219 images failed" in text


def test_the_same_runs_make_the_same_page(output, page):
    before = (output / "set/report.html").read_bytes()
    run(report, "set/w0", "set/close", str(output / "set/far"), f"paths.output={output}")
    again = (output / "set/report.html").read_bytes()
    run(report, "set/far", "set/close", "set/w0", f"paths.output={output}")
    assert (output / "set/report.html").read_bytes() == before != again


def test_missing_stages_say_how_to_run_them(tmp_path):
    folder = tmp_path / "mine/samples" / os.fsdecode(b"caf\xe9")  # a name that is not UTF-8
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    run(report, "mine", f"paths.output={tmp_path}", "--preset", "paper_casia")
    text = Page(tmp_path / "mine/report.html").text
    for script in ("align", "plot_distributions", "train_fr", "verify_fr"):
        assert f"python {script}.py paths.run=mine" in text


def test_faces_of_ones_own(tmp_path):
    """Nothing was sampled: the photographs that were aligned are shown, and those that failed."""
    photos, aligned = tmp_path / "photos", tmp_path / "mine" / "aligned"
    for file in (photos / "p/0.jpg", photos / "p/1.jpg", aligned / "p/0.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), "red").save(file)
    write_list(aligned, "failures", {("p", "1.jpg"): "no face"})
    write_list(aligned, "sources", {("p", "0.jpg"): "0", ("p", "1.jpg"): "0"})
    write_json(aligned / "align.json", {"decides": {"align.images": str(photos)}, "config": {"align": {"images": "photos"}}})
    run(report, "mine", f"paths.output={tmp_path}")
    page = Page(tmp_path / "mine/report.html")
    assert [attributes["alt"] for attributes in page.all("img")] == [
        "identity p, image 0, mine", "identity p, image 1, mine", "identity p, image 1.jpg, mine"]
    text = " ".join(page.text.split())
    assert "1 identity, 2 images of each." in text and "1 of 2 images failed" in text
    assert "python align.py align.images=photos" in text and "do not exist" not in text


def test_the_best_run_need_not_be_the_papers(tmp_path, monkeypatch):
    """w = 1 is in no table of the paper; nor need the runs lie together."""
    write_run(tmp_path / "a", "w0", 1.0, {"guidance.w": "0"})
    write_run(tmp_path / "b", "w1", 3.0, {"guidance.w": "1"}, seed=1)
    monkeypatch.chdir(tmp_path)
    run(report, "w0", str(tmp_path / "b" / "w1"), "paths.output=a")
    text = " ".join(Page(tmp_path / "report.html").text.split())
    assert "with b/w1" in text and "paper 2.43" not in text


def test_an_unknown_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: is no run in"):
        run(report, "nowhere", f"paths.output={tmp_path}")


@pytest.mark.parametrize("metrics", [
    [], {"fdr": "<b>", "intervals": {"fdr": ["x", {}], "eer": 3}, "most_similar_identities": "abc"},
    {"fdr": 0, "most_similar_identities": ["../..", None, "high"], "variety": [1]}])
def test_metrics_that_are_none(tmp_path, metrics):
    write_run(tmp_path, "odd", 1.0, {})
    write_json(tmp_path / "odd/scores/recogniser/metrics.json", metrics)
    run(report, "odd", f"paths.output={tmp_path}")
    assert len(Page(tmp_path / "odd/report.html").all("script")) == 1


@pytest.mark.parametrize("file", ["run.json", "aligned/align.json", "scores/recogniser/scores.json", "fr/a/verification.json"])
@pytest.mark.parametrize("record", [[], {"config": 3, "decides": [], "versions": "x", "per_cent": [1]}, {
    "config": {"preset": [], "paths": 1, "guidance": {"w": {}}, "negatives": {"strategy": ["<b>"]}, "sampling": None},
    "decides": {"a": [[]]}}])
def test_records_that_are_none(tmp_path, file, record):
    write_json(write_run(tmp_path, "odd", 1.0, {}) / file, record)
    run(report, "odd", f"paths.output={tmp_path}")
    assert len(Page(tmp_path / "odd/report.html").all("script")) == 1


def test_a_damaged_log_is_one_line(tmp_path):
    log = write_run(tmp_path, "odd", 1.0, {}) / "fr/a/log.csv"
    log.parent.mkdir(parents=True)
    log.write_text('loss\n"' + "9" * 200_000)
    with pytest.raises(UserError, match="log.csv: is not a readable log"):
        run(report, "odd", f"paths.output={tmp_path}")


@pytest.mark.slow
def test_thousands_of_identities_stay_below_15_mb(tmp_path):
    """Pictures of noise, which nothing compresses, are sampled and not cut short."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for name in ("w0", "far"):
        for i in range(2000):
            folder = tmp_path / name / "samples" / f"{i:06d}"
            folder.mkdir(parents=True)
            for k in range(6):
                os.link(tmp_path / "noise.png", folder / f"{k}.png")
    run(report, "w0", "far", f"paths.output={tmp_path}")
    page = Page(tmp_path / "report.html")
    assert 5e6 < (tmp_path / "report.html").stat().st_size < 15e6
    assert "of 2,000 identities, evenly spaced by name" in page.text
    assert len(page.all("img")) >= 20 * 2 * IMAGES and not [one for one in page.all("span") if one.get("class") == "face lost"]


@pytest.mark.parametrize("arguments", [
    {}, {"guidance.w": "0", "paths.run": "a b's"}, {"guidance.schedule": "interval", "guidance.interval": "200,800"},
    {"sampling.as_published": "true", "sampling.solver": "ddim", "negatives.pool": "7", "model.diffusion": "data/a $HOME"},
    {"variety.cone": "0.7", "variety.w": "uniform", "sampling.spacing": "karras"}])
@pytest.mark.parametrize("preset", ["demo", "paper_casia"])
def test_commands_give_the_settings_back(arguments, preset):
    config = load_config("", arguments=["--preset", preset, *(f"{name}={value}" for name, value in arguments.items())])
    words = shlex.split(Stage("sample", {"config": json.loads(json.dumps(asdict(config)))}, Path(), Path()).command())
    assert words[:2] == ["python", "sample.py"] and load_config("", arguments=words[2:]) == config


def test_a_density_is_one_and_keeps_its_mean():
    counts = np.zeros(200_000, np.int64)
    counts[[120_000, 150_000]] = 300, 100  # cosines 0.2 and 0.5
    density = charts.density(counts, 0.13)
    x = np.linspace(-1, 1, 401)[1::2]
    assert density.sum() * 0.01 == pytest.approx(1, abs=1e-6)
    assert (x * density).sum() * 0.01 == pytest.approx(0.275, abs=0.006)


def test_the_chart_shows_rates_at_the_place_of_the_eer():
    genuine, impostor = np.zeros(200_000, np.int64), np.zeros(200_000, np.int64)
    genuine[[130_000, 170_000]], impostor[[90_000, 140_000]] = (10, 90), (90, 10)
    one = ScoreDistributions(genuine, impostor, np.float64(0.66), np.float64(0.12), np.float64(-0.05), np.float64(0.15))
    chart = charts.distributions([("w0", 0, one)])
    row = [column[chart["start"]] for column in chart["values"]["rows"][0]]
    assert 0.3 <= float(chart["values"]["x"][chart["start"]]) <= 0.4 and row[2:] == ["10.0%", "10.0%"]


def test_labels_do_not_cover_one_another():
    placed = charts.labels([(f"run{i}", i, 0.5 + 0.01 * i, 0.3) for i in range(6)])
    tops = sorted(label["top"] for label in placed)
    assert len(placed) == 6 and min(np.diff(tops)) >= 100 * charts.LABEL[1] - 1e-6


def test_numbers_as_text():
    assert [digits(value, 2) for value in (-0.001, -1.5, 1234.5, float("nan"), "<b>", None)] == [
        "0.00", "\N{MINUS SIGN}1.50", "1,234.50", "", "", ""]


def test_ticks_are_round_and_whole_for_epochs():
    assert charts.ticks(-0.4, 1.0) == [0.0, 0.5, 1.0]
    assert charts.ticks(1, 2, whole=True) == [1, 2]
