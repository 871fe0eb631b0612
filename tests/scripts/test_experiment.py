"""experiments/experiment.py: intervals and verdicts by hand, and the whole of it on next to nothing."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import verify_fr
from experiments import documents, experiment, experiment_trials
from experiments.blocks import contrast
from experiments.experiment_report import Report, measured
from experiments.experiment_trials import CEILING, FAR, FRONTIER, KEPT, W0, Trial, factorial
from experiments.solver_trials import Images
from models.backbones import MobileFaceNet
from tests.running import killed_at, run
from tests.scripts.test_score_and_verify import picture, png
from utils.evaluation.verification import read_lfw_pairs
from utils.faces.aligned import write_kept
from utils.runtime.errors import UserError
from utils.runtime.files import write_bytes, write_json, write_text

# ---- intervals and verdicts ------------------------------------------------------------------------------------------

def test_two_arms_of_the_same_seeds_have_the_paired_t_interval():
    # differences 1, 2, 3, 4, 5: standard error sqrt(2.5 / 5) = 0.70711; t of 0.95 with 4 degrees of freedom is 2.13185
    values = {("base", seed): seed ** 3.0 for seed in range(5)} | {("arm", seed): seed ** 3.0 + 1 + seed for seed in range(5)}
    assert contrast(values, "arm", "base") == pytest.approx((3, 3 - 1.50744, 3 + 1.50744), abs=1e-5)
    value, low, high = contrast({("base", 0): 2.0, ("arm", 0): 9.0}, "arm", "base")
    assert value == pytest.approx(7) and math.isnan(low) and math.isnan(high)


def test_a_whole_table_has_one_noise():
    # means 2, 3, 7 of arms, 3, 5 of seeds: what is left is -1, 0, 1 and 1, 0, -1, in squares 4, of (3 - 1)(2 - 1) = 2 degrees;
    # variance 2, of a difference 2 x 2 / 2, so its error is sqrt(2), times 2.91999
    table = {"a": (0, 4), "b": (2, 4), "c": (7, 7)}
    values = {(arm, seed): float(one) for arm, both in table.items() for seed, one in enumerate(both)}
    assert contrast(values, "c", "a") == pytest.approx((5, 5 - 4.12948, 5 + 4.12948), abs=1e-5)
    assert contrast(values, "a", "c") == pytest.approx((-5, -5 - 4.12948, -5 + 4.12948), abs=1e-5)


def test_other_arms_tell_how_lucky_the_only_seed_of_one_was():
    # c has seed 0 only, where a and b are 4 lower than in seed 1: their means there are 2 below their own, and so c is 9, a 4
    values = {("a", 0): 2.0, ("a", 1): 6.0, ("b", 0): 3.0, ("b", 1): 7.0, ("c", 0): 7.0}
    assert contrast(values, "c", "a") == pytest.approx((5, 5, 5))
    # now with noise: a 2, 6, b 3, 9, seeds 5 apart, a's mean 4, so c is 7 + 2.5; what is left is +-0.5 four times, of one
    # degree of freedom: variance 1. c - a = c0 - (3 a0 + a1 + b0 - b1) / 4, so its variance is 1 + 12 / 16; t is 6.31375
    values |= {("b", 1): 9.0}
    reach = 6.31375 * math.sqrt(1.75)
    assert contrast(values, "c", "a") == pytest.approx((5.5, 5.5 - reach, 5.5 + reach), abs=1e-4)


def test_arms_that_no_seed_links_are_not_compared():
    values = {("a", 0): 1.0, ("b", 0): 2.0, ("c", 1): 3.0, ("d", 1): 4.0}
    assert contrast(values, "a", "c") is None and contrast(values, "a", "e") is None and contrast({}, "a", "b") is None
    assert contrast(values, "b", "a")[0] == pytest.approx(1)
    assert contrast(values | {("d", 0): 1.5}, "c", "a")[0] == pytest.approx(-0.5)  # by d


def figures(accuracy: float, tar: float, celeba: float = 60.0, celeba_tar: float = 10.0) -> dict:
    return {"genuine_mean": 0.4, "impostor_mean": 0.1, "vendi": 5.0, "fdr": 3.0, "tests": {
        "LFW": {"accuracy": accuracy, "TAR@1e-2": tar}, "celeba_180": {"accuracy": celeba, "TAR@1e-2": celeba_tar}}}


def row(table: str, arm: str, seed: int, of: dict, processor: str = "this processor", images: str = "2x2") -> dict:
    return {"table": table, "images": images, "arm": arm, "seed": seed, "processor": processor, "recipe": "today's", **of}


def test_points_and_logarithms_are_compared():
    assert measured(figures(75, 30), "LFW", "accuracy") == 75
    assert measured(figures(75, 30), "LFW", "TAR@1e-2") == pytest.approx(math.log(30))
    assert measured(figures(70, 0), "LFW", "TAR@1e-2") is None and measured(figures(70, 20), "LFW", "TAR@1e-3") is None


@pytest.fixture
def report(tmp_path):
    """Three seeds of w = 0 and of two plain negatives in the factorial; `fill` adds an arm."""
    report = Report(tmp_path, [], [], docs=False)

    def add(name: str, *values: tuple[float, ...], part: str = "factorial"):
        for seed, one in enumerate(values, start=1):
            report.add(row(part, name, seed, figures(*one)))
    report.fill = add
    add(W0, (70, 20), (71, 20), (72, 20))
    add(FAR, (70, 21), (70, 21), (70, 21))
    add("close w0.5", (72, 22), (72, 22), (72, 22))
    return report


def test_the_frontier_is_compared_by_pairs_where_it_has_several_seeds(report):
    report.fill(W0, (70, 20), part="frontier")
    report.fill(FAR, (71, 22), part="frontier")
    report.fill("close w0.5", (72, 21), part="frontier")
    assert report.differences("frontier") == []  # one seed says nothing
    report.fill(W0, (70, 20), (80, 30), part="frontier")
    report.fill(FAR, (71, 22), (81, 33), part="frontier")
    text = (report.folder / "experiment.md").read_text()
    frontier, factorial = text.split("## ")[1:]
    assert frontier.startswith("Frontier: 2 identities x 2 images") and factorial.startswith("Factorial: 2 identities x 2 images")
    assert f"| {FAR} | w0 | 2 | +1.00 (+1.00 to +1.00) | 1.10 (1.10 to 1.10) |" in frontier
    assert f"| {FAR} (2) | 0.400 +- 0.000 |" in frontier and f"| {FAR} (3) |" in factorial
    # against w = 0 and the best plain negative, not against every other
    assert f"| close w0.5 | {FAR} | 1 | +1.00 (+1.00 to +1.00) | 0.95 (0.95 to 0.95) |" in frontier
    assert "| w0 | close w0.5 |" not in frontier
    assert "| w0 | close w0.5 |" in factorial
    axes = report.plot_frontier().axes[2]  # the ratio of TAR
    assert [text.get_text() for text in axes.texts] == ["w0.5", "w0.5"]  # their colours are of far and close
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] == pytest.approx([1.1, 1.05])


def test_sets_of_several_numbers_of_identities_are_told_apart(report):
    for images, tar in ((Images(750, 4), 20), (Images(3000, 4), 30)):
        for arm, times in ((W0, 1.0), (FAR, 1.2)):
            report.add(row(f"identities {images}", arm, 1, figures(70, tar * times), images=str(images)))
    *_, few, many = (report.folder / "experiment.md").read_text().split("## ")
    assert few.startswith("More identities: 750 identities x 4") and many.startswith("More identities: 3000 identities x 4")
    for text in (few, many):
        assert f"| {FAR} | w0 | 1 | +0.00 | 1.20 |" in text


def test_pairs_are_of_the_seeds_that_both_have(report):
    report.rows = [one for one in report.rows if one["arm"] == W0]
    report.fill("new", (74, 20), (76, 20))
    # 4 and 5: standard error 0.5; t of 0.95 with 1 degree of freedom is 6.31375
    assert report.paired("new", W0, "LFW", "accuracy") == pytest.approx((4.5, 4.5 - 3.15688, 4.5 + 3.15688), abs=1e-5)
    table = (report.folder / "experiment.md").read_text()
    assert "| new | w0 | 2 | +4.50 (+1.34 to +7.66) | 1.00 (1.00 to 1.00) |" in table and "real faces" not in table
    report.fill(CEILING.name, (74, 30))
    row, = (line for line in (report.folder / "experiment.md").read_text().splitlines() if line.startswith("| real faces | w0"))
    # seed 1 is 0.75 below seed 2, so real faces are 74.75, and w = 0 is 70.5; what is left is +-0.25 four times, of one degree of
    # freedom: variance 0.25, of the difference 1.75 times that; t is 6.31375
    assert row == ("| real faces | w0 | 1 | +4.25 (+0.07 to +8.43) | 1.50 (1.50 to 1.50) |  | +0.00 (+0.00 to +0.00) | "
                   "1.00 (1.00 to 1.00) |  |  |")
    axes, _ = report.plot_factorial().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["new", CEILING.name]
    ratios = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "s"]
    assert axes.yaxis_inverted() and ratios == [pytest.approx(1.5)]


@pytest.mark.parametrize("values, helps", [
    ([(74, 20, 61), (75, 20, 61), (76, 20, 61)], True),  # 4 points each, confirmed
    ([(74, 20, 61), (75, 20, 61), (76, 20, 58)], False),  # not on the other test set
    ([(72.9, 20, 61), (73.9, 20, 61), (74.9, 20, 61)], False),  # 2.9 points
    ([(70, 20, 61), (82, 20, 61), (74, 20, 61)], False),  # 5 points, but 0, 11 and 2... of no clear sign
    ([(70, 26, 60, 11), (71, 27, 60, 11), (72, 26, 60, 12)], True),  # 1.31 times the TAR, confirmed
    ([(70, 25, 60, 11), (71, 26, 60, 11), (72, 25, 60, 12)], False),  # 1.27 times
    ([(74, 20, 61)], False)])  # one seed
def test_what_helps(report, values, helps):
    report.fill("new", *values)
    assert report.helps("new", W0) is helps


def test_arms_are_compared_with_plain_negatives_and_the_best_of_the_frontier_join_them(report):
    report.fill("far w0.5, perturbed", (90, 20), (90, 20), (90, 20))
    assert report.baselines("factorial") == [W0, FAR, "close w0.5"]
    assert report.best_of_frontier() == []
    report.fill("null w1", (60, 20), part="frontier")
    report.fill("mid w0.25", (50, 19, 60, 11), part="frontier")  # 19 x 11 is more than 20 x 10
    report.fill(W0, (99, 20), part="frontier")
    assert report.best_of_frontier() == ["mid w0.25"]
    report.fill("far w1, perturbed to 0.5", (99, 19), part="frontier")
    report.fill("far w1, perturbed", (60, 21), part="frontier")
    assert report.best_of_frontier() == ["mid w0.25", "far w1, perturbed"]


@pytest.mark.parametrize("text", ["{}", "[1]", "[{}]", json.dumps([row("frontier", W0, 0, figures(1, 1)) | {"seed": "0"}]),
                                  json.dumps([{**row("frontier", W0, 0, figures(1, 1)), "tests": 3}])])
def test_what_is_kept_is_checked(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    assert experiment_trials.Laboratory.kept(None, {}) == ([], [])
    write_text(tmp_path / KEPT, text)
    with pytest.raises(UserError, match="experiment_trials.json: is no list of trials; restore it"):
        experiment_trials.Laboratory.kept(None, {})


def test_the_arms_are_those_of_the_question():
    names = [arm.name for arm in factorial(["close w0.25", "far w1, perturbed to 0.7"])]
    assert names == ["w0", "w0, band", "w0, perturbed", "w0, perturbed, band", "far w0.5", "far w0.5, band",
                     "far w0.5, perturbed", "far w0.5, perturbed, band", "far w0..1", "w0, annealed", "far w0.5, annealed",
                     "close w0.25", "far w1, perturbed to 0.7"]
    assert len(factorial([FAR, f"{FAR}, perturbed"])) == len(factorial()) == 11
    assert len(FRONTIER) == 1 + 5 * 3 + 1 + 2 * 3 + 1 + 1
    assert sum(arm.is_plain for arm in FRONTIER.values()) == 17


def test_what_is_kept_is_of_any_processor_and_not_made_again(report):
    report.rows = [row("frontier", W0, 0, figures(70, 20), "that one"), row("frontier", FAR, 0, figures(71, 21), "that one"),
                   row("frontier", W0, 6, figures(70, 20))]

    def is_kept(arm: str, seed: int, identities: int = 2, part: str = "frontier") -> bool:
        return report.is_kept(Trial(part, FRONTIER[arm], seed, Images(identities, 2)), "this processor")

    assert is_kept(W0, 0) and is_kept("null w1", 0)  # nothing here is compared with another processor's
    assert is_kept(W0, 6) and not is_kept("null w1", 6) and not is_kept(W0, 1) and not is_kept(W0, 6, part="factorial")
    report.add(row("frontier", FAR, 6, figures(72, 21)))
    text = (report.folder / "experiment.md").read_text()
    assert "Measured: seed 0 on that one; seed 6 on this processor." in text
    assert f"| {FAR} | {W0} | 2 | +1.50 (-1.66 to +4.66) |" in text  # 1 and 2
    report.rows = [row("factorial", W0, 1, figures(70, 20), "that one")]
    assert report.is_kept(Trial("ceiling", CEILING, 1, Images(2, 2)), "this processor")  # they are compared
    report.rows = [row("identities 3x2", W0, 1, figures(70, 20))]
    assert is_kept(W0, 1, 3, "identities") and not is_kept(W0, 1, 2, "identities")


# ---- the whole of it -------------------------------------------------------------------------------------------------

PEOPLE, IMAGES, TESTED = 24, 5, 5


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Aligned patterns of PEOPLE, pairs in ten folds of which the last two are of the last TESTED people, a recogniser."""
    folder = tmp_path_factory.mktemp("lfw")
    names = [f"P_{i:02}" for i in range(PEOPLE)]
    kept = {name: [folder / "aligned" / name / f"{name}_{k:04}.png" for k in range(1, IMAGES + 1)] for name in names}
    for i, files in enumerate(kept.values()):
        for k, file in enumerate(files):
            write_bytes(file, png(picture(i, k)))
    write_kept(folder / "aligned", kept)
    write_json(folder / "aligned" / "align.json", {"decides": {"align.template": "arcface", "align.images": str(folder)}})
    lines = ["10\t5"]
    for fold in range(10):
        people = names[:-TESTED] if fold < 8 else names[-TESTED:]
        lines += [f"{people[k]}\t{1 + fold % 4}\t5" for k in range(5)]
        lines += [f"{people[k]}\t{1 + fold % 5}\t{people[(k + 1) % 5]}\t{1 + k}" for k in range(5)]
    write_text(folder / "pairs.txt", "\n".join(lines) + "\n")
    torch.manual_seed(0)
    torch.save(MobileFaceNet(num_features=128).state_dict(), folder / "contexts.pth")
    return folder


@pytest.fixture
def small(faces, monkeypatch):
    """Sets of 9 x 3 images in few steps: two arms in the frontier and three in the factorial, one of them filtered; and one of
    10 x 2."""
    arms = {arm.name: arm for arm in factorial()}
    few = [arms[name] for name in (W0, FAR, f"{FAR}, band")]
    monkeypatch.setattr(experiment, "FRONTIER", {name: FRONTIER[name] for name in (W0, FAR)})
    monkeypatch.setattr(experiment, "factorial", lambda best: few)
    monkeypatch.setattr(experiment, "IDENTITIES", [FRONTIER[W0]])
    monkeypatch.setattr(experiment_trials, "BAND", "align.band=-1,1")
    return ["--frontier", "9x3", "--sets", "9x3", "--identities", "10x2", "--seeds", "1", "--spare", "1",
            "device=cpu", "contexts.number=12",
            "sampling.identities=1", "sampling.steps=6", "align.processes=1", "fr.epochs=1", "fr.milestones=", "fr.batch_size=8",
            f"contexts.recogniser={faces / 'contexts.pth'}", f"verify.lfw_faces={faces / 'aligned'}",
            f"verify.lfw_pairs={faces / 'pairs.txt'}"]


def test_the_estimate_comes_first_and_what_does_not_fit_is_left(small, tmp_path, capsys, faces):
    run(experiment, *small, "--minutes", "0", f"paths.output={tmp_path}")
    printed = capsys.readouterr().out
    assert "frontier: 2 sets to make, 60 images to draw" in printed
    assert "factorial: 3 sets to make, 72 images to draw" in printed and "ceiling: 1 sets to make, 0 images to draw" in printed
    assert "identities 10x2: 1 sets to make, 22 images to draw" in printed
    assert "7 trials did not fit into 0 minutes (the first: frontier, w0, seed 0)" in printed
    run(experiment, *small, "--minutes", "0", "--arms", FAR, "--parts", "frontier,factorial", f"paths.output={tmp_path}")
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(experiment, *small, "--arms", "far w3", f"paths.output={tmp_path}")
    assert "'far w3' is none; choose from w0; far w0.5;" in capsys.readouterr().err
    assert "frontier: 1 sets to make, 30 images to draw" in printed and "factorial: 1 sets to make, 36 images to draw" in printed
    assert not (tmp_path / "contexts").exists() and not (tmp_path / "experiment" / "runs").exists()
    pairs, same = read_lfw_pairs(tmp_path / "experiment" / "lfw_folds_9_and_10_pairs.txt")
    whole, _ = read_lfw_pairs(faces / "pairs.txt")
    assert sorted(pairs) == sorted(whole[-20:]) and same.tolist() == [True, False] * 10
    assert (tmp_path / "experiment" / "lfw_folds_9_and_10_people.txt").read_text().split() == [f"P_{i}" for i in range(19, 24)]


@pytest.mark.parametrize("arguments, words", [
    (["--frontier-seeds", "0,1"], "--seeds: 1 is a seed of the frontier"),
    (["--speed"], "--speed: is not understood"), (["verify.lfw_faces=a,b"], "2 folders for 1 pair lists"),
    (["verify.lfw_faces=nowhere"], "nowhere/align.json: no such file"),
    (["contexts.recogniser=nowhere.ckpt"], "nowhere.ckpt: no such file .contexts.recogniser.; the band filter needs")])
def test_what_cannot_be_run_is_one_line(small, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        run(experiment, *small, f"paths.output={tmp_path}", *arguments, "--minutes", "0")


@pytest.mark.slow
def test_a_small_experiment_goes_on_after_a_kill_to_the_same_tables(small, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    write_text(tmp_path / "docs" / "experiment.md",
               "Prose.\n\n{}\nstale\n{}\nEarlier.".format(*documents.markers("experiment")))
    whole, killed = (f"paths.output={tmp_path / name}" for name in ("whole", "killed"))
    run(experiment, *small, whole, "--docs")
    table = (tmp_path / "whole" / "experiment" / "experiment.md").read_text()
    document = (tmp_path / "docs" / "experiment.md").read_text()
    assert document.startswith("Prose.\n") and document.endswith("\nEarlier.") and "stale" not in document and table in document
    assert all((tmp_path / "docs" / "demo" / f"{name}.png").stat().st_size > 10_000 for name in ("frontier", "factorial"))
    assert all(f"| {name} (1) |" in table for name in (CEILING.name, W0, FAR, f"{FAR}, band"))
    assert "## More identities: 10 identities x 2 images" in table
    assert f"| {FAR}, band | {W0} | 1 |" in table and f"| {W0} | {FAR} | 1 |" in table
    assert not list((tmp_path / "whole").glob("experiment/runs/*/fr/faces-*"))

    with killed_at(4, verify_fr, "write_json"):  # in the factorial, before a trial is kept
        run(experiment, *small, killed)
    assert len(list((tmp_path / "killed" / "experiment" / "trials").glob("*/figures.json"))) == 3
    run(experiment, *small, killed)
    assert (tmp_path / "killed" / "experiment" / "experiment.md").read_text() == table

    def refuse(*arguments):
        raise AssertionError("made again")

    monkeypatch.setattr(experiment_trials, "stage", refuse)
    run(experiment, *small, killed)
    elsewhere = f"paths.output={tmp_path / 'elsewhere'}"
    kept = (tmp_path / KEPT).read_text()
    assert kept.count("\n") == 7 + 2
    run(experiment, *small, elsewhere, "--docs")  # all kept
    assert (tmp_path / "docs" / "experiment.md").read_text() == document and (tmp_path / KEPT).read_text() == kept
    for other in (("fr.epochs=2",), ("--frontier", "8x3", "--sets", "8x3", "--identities", "9x2")):
        with pytest.raises(AssertionError, match="made again"):
            run(experiment, *small, elsewhere, "--docs", *other)
    with pytest.raises(UserError, match="--seeds: 0 is a seed of the frontier"):
        run(experiment, *small, elsewhere, "--docs", "--seeds", "0", "--parts", "factorial")
    report = Report(tmp_path, *experiment_trials.Laboratory.kept(SimpleNamespace(recipe=lambda arm, table: ""), {}), docs=True)
    assert (len(report.rows), len(report.others)) == (0, 7)
    report.add(row("frontier", W0, 5, figures(70, 20)))  # of another recipe: they are kept, in no table
    assert (tmp_path / KEPT).read_text().startswith(kept.removesuffix("\n]\n"))
    assert (tmp_path / "docs" / "experiment.md").read_text().count(f"| {W0} (1) |") == 1
    shutil.rmtree(tmp_path / "killed" / "experiment" / "trials")
    with pytest.raises(AssertionError, match="made again"):
        run(experiment, *small, killed)


@pytest.mark.slow
def test_a_band_that_leaves_too_few_is_said_and_the_others_are_made(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment_trials, "BAND", "align.band=0.9999,1")
    run(experiment, *small, "--parts", "factorial", f"paths.output={tmp_path}")
    assert "far w0.5, band, seed 1: 0 of 27 images are left by align.band=0.9999,1; raise --spare" \
        in capsys.readouterr().out
    assert len(list((tmp_path / "experiment" / "trials").glob("*/figures.json"))) == 2


def test_the_ceiling_leaves_out_those_of_the_tested_people_who_have_faces(small, faces, tmp_path):
    shutil.copytree(faces / "aligned", tmp_path / "aligned")
    shutil.rmtree(tmp_path / "aligned" / "P_20")
    settings = [one for one in small if "=" in one] + [f"paths.output={tmp_path}", f"verify.lfw_faces={tmp_path / 'aligned'}"]
    config = experiment.load_config("", arguments=["--preset", "experiment", *settings])
    laboratory = experiment_trials.Laboratory(config, settings, 1, torch.device("cpu"))
    arguments = laboratory.arguments(Trial("ceiling", CEILING, 1, Images(10, 3)))
    left_out, = (one.partition("=")[2] for one in arguments if one.startswith("fr.leave_out=") and one != "fr.leave_out=")
    assert Path(left_out).read_text().split() == ["P_19", "P_21", "P_22", "P_23"]  # train_fr.py refuses a name that is not there
    assert "P_20" in laboratory.people.read_text().split()  # but the tests count it


def test_people_of_the_ceiling_are_as_many_images_and_none_is_tested(small, tmp_path):
    run(experiment, *small, "--minutes", "0", f"paths.output={tmp_path}")
    settings = [one for one in small if "=" in one] + [f"paths.output={tmp_path}"]
    config = experiment.load_config("", arguments=["--preset", "experiment", *settings])
    laboratory = experiment_trials.Laboratory(config, settings, 1, torch.device("cpu"))
    assert [laboratory.real_people(images) for images in (1, 12, 13, 30, 1000)] == [1, 2, 3, 6, PEOPLE - TESTED]
    ceiling, other = (Trial("ceiling", CEILING, seed, Images(10, 3)) for seed in (1, 2))
    assert "fr.identities=6" in laboratory.arguments(ceiling)
    assert laboratory.record(ceiling).file != laboratory.record(other).file
    assert laboratory.people_with_faces.read_text() == laboratory.people.read_text()
    plain = Trial("factorial", factorial()[0], 1, Images(9, 3))
    before = laboratory.record(plain).decides
    many = Trial("identities", factorial()[0], 1, Images(20, 2))  # more than contexts.number, which is 12
    assert "contexts.number=21" in laboratory.arguments(many) and "contexts.number=12" in laboratory.arguments(plain)
    assert laboratory.record(many).file.parent.name == "identities-20x2-w0-seed1"
    laboratory.spare = 2  # a trial never chooses from what another one has drawn
    assert laboratory.record(plain).decides == before | {"run": before["run"].replace("12x3", "12x6")}
    assert "sampling.images_per_identity=6" in laboratory.arguments(plain)
    laboratory.kind = "another"
    assert laboratory.record(plain).decides["run"] != before["run"]
    with_tests = 30 + 2 / 3 * TESTED * IMAGES  # embedded twice, by a third of what training takes
    assert np.isclose(laboratory.work(ceiling)["train"], with_tests * laboratory.train_gflop)
