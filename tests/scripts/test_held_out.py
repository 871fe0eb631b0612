"""experiments/held_out.py: who is held out, what is said of them, and the whole of it on drawn faces and the included weights."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import documents, held_out
from tests.drawn_face import draw_face
from tests.running import run
from utils.evaluation import scores
from utils.runtime.files import write_text
from utils.training.faces import TrainingFaces


def faces_of(people: list[str], each: int) -> TrainingFaces:
    files = [Path(f"{name}/{k}.png") for name in people for k in range(each)]
    return TrainingFaces(files, np.repeat(np.arange(len(people)), each), people, None, "digest")


def test_each_folder_s_people_but_those_who_choose_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "VALIDATION_IDENTITIES", 1)
    faces = faces_of(["a/p", "a/q", "a/r", "a/trained", "b/p", "b/q", "b/r", "b/s", "b/t", "b/trained"], 2)
    (tmp_path / "list.txt").write_text("\n".join(set(faces.identities) - {"a/trained", "b/trained"}))
    contexts = np.arange(20 * 2, dtype=np.float32).reshape(20, 2)
    people = held_out.held_out_people(faces, str(tmp_path / "list.txt"), lambda rows: contexts[rows])
    assert people.names == ["0000-a-q", "0001-b-q", "0002-b-r", "0003-a-r", "0004-b-s", "0005-b-t"]
    assert people.sources.tolist() == ["a", "b", "b", "a", "b", "b"]
    assert people.contexts[:, 0].tolist() == [4, 20, 24, 8, 28, 32]  # of the first of two faces
    assert [rows.tolist() for rows in people.rows[:2]] == [[2, 3], [10, 11]]


def embeddings_of(people: int, each: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(people)
    return np.repeat(random.standard_normal((people, 16)), each, axis=0) + spread * random.standard_normal((people * each, 16))


def test_women_are_compared_with_women_by_their_first_images(monkeypatch):
    monkeypatch.setattr(held_out, "IMAGES", 3)
    names = np.array([f"{k:02d}" for k in range(30)])
    is_woman = {name: k % 3 == 0 for k, name in enumerate(names)}
    drawn = {"w0": (embeddings_of(30, 4, 1.0), np.repeat(names, 4)), "far": (embeddings_of(30, 3, 0.5), np.repeat(names, 3))}
    head, _, women, men = held_out.table_of_sexes(drawn, is_woman).splitlines()
    expected = []
    for embeddings, labels in drawn.values():
        chosen = np.array([is_woman[name] for name in labels]) & (np.arange(len(labels)) % (len(labels) // 30) < 3)
        expected.append(scores.metrics(scores.score_distributions(embeddings[chosen], labels[chosen]))["fdr"])
    cells = [cell.strip() for cell in women.split("|")]
    assert cells[1:3] == ["women", "10"] and men.startswith("| men | 20 |")
    assert [cell.split(" ")[0] for cell in cells[3:5]] == [f"{value:.3f}" for value in expected]
    assert cells[5].split(" ")[0] == f"{expected[1] / expected[0]:.2f}" and "FDR, far" in head

    embeddings, labels = drawn["far"]  # one woman's faces are all lost there: she is in neither figure
    lost, kept = drawn | {"far": (embeddings[3:], labels[3:])}, {name: one for name, one in is_woman.items() if name != "00"}
    assert held_out.table_of_sexes(lost, is_woman) == held_out.table_of_sexes(lost, kept)
    assert "| women | 9 |" in held_out.table_of_sexes(lost, is_woman)


def test_a_summary_has_the_papers_figures_beside_ours():
    table = ("| images | EER | FMR100 | FDR | FDR ratio |\n|---|---|---|---|---|\n| w0 | 0.1 (0.0 to 0.2) | 0.5 | 2.000 | |\n"
             "| paper: w = 0 | 0.13 | 0.4 | 2.427 | |\n| far | 0.05 | 0.2 | 5.000 | 2.50 (2.4 to 2.6) |\n"
             "| paper: far | 0.04 | 0.1 | 5.687 | 2.34 |\n")
    assert held_out.summary(table).splitlines()[2:] == [
        "| none (w = 0) | 0.1 (0.0 to 0.2) | 2.000 |  | 2.427 |  |", "| far | 0.05 | 5.000 | 2.50 (2.4 to 2.6) | 5.687 | 2.34 |"]


@pytest.mark.slow
def test_of_two_folders_of_drawn_faces(tmp_path, monkeypatch, capsys):
    pytest.importorskip("prdc")

    class Colours(torch.nn.Module):  # as wide as the included generator's contexts
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(faces, (8, 16))[:, 0].flatten(1)

    random = np.random.default_rng(0)  # women are drawn lighter, those of odd numbers
    for name in [f"{folder}/p{k:02d}/{j}.png" for folder in "ab" for k in range(9) for j in range(3)] + \
            [f"chips/{k:02d}.png" for k in range(12)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lowest = 120 + 80 * (int(re.search(r"(\d\d)[/.]", name)[1]) % 2)
        skin = tuple(random.integers(lowest, lowest + 40, 3).tolist())
        Image.fromarray(draw_face(120, skin=skin)).save(tmp_path / name)
    (tmp_path / "chips_labels.csv").write_text("number,age,sex,ethnicity\n" + "".join(
        f"{k:02d},30,{('male', 'female')[k % 2]},x\n" for k in range(12)))
    (tmp_path / "list.txt").write_text("".join(f"{folder}/p{k:02d}\n" for folder in "ab" for k in range(8)))
    (tmp_path / "recogniser.pth").write_bytes(b"1")
    of_scores = held_out.load_backbone
    monkeypatch.setattr(held_out, "load_backbone", lambda file: Colours() if str(file).endswith("pth") else of_scores(file))
    for name, value in {"VALIDATION_IDENTITIES": 1, "IMAGES": 2, "AGAINST_REAL": 21, "REPLICATES": 20}.items():
        monkeypatch.setattr(held_out, name, value)
    found, names, of_faces = [], [], held_out.women

    def women(*arguments: object) -> np.ndarray:
        names.append(arguments[4].names)
        found.append(of_faces(*arguments))
        return found[0]

    monkeypatch.setattr(held_out, "women", women)
    monkeypatch.setattr(held_out.scores, "MIN_BOOTSTRAP_IDENTITIES", 2)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    for document in ("docs/results.md", *held_out.SUMMARIES):
        write_text(tmp_path / document, "Before.\n{}\nold\n{}\nAfter.".format(*documents.markers("held_out")))
    run(held_out, "--docs", f"--labelled={tmp_path / 'chips'}", f"training.faces={tmp_path / 'a'},{tmp_path / 'b'}",
        f"training.held_out={tmp_path / 'list.txt'}", f"contexts.recogniser={tmp_path / 'recogniser.pth'}",
        "align.minimum_face=30", f"paths.output={tmp_path / 'o'}", "device=cpu", "sampling.solver=ddim", "sampling.steps=3")
    assert found[0].tolist() == [name[-1] in "13579" for name in names[0]]
    text = (tmp_path / "o" / "held-out" / "demo" / "held_out.md").read_text()
    assert text in capsys.readouterr().out
    below, above = documents.markers("held_out")
    assert f"Before.\n{below}\n{text}{above}\nAfter." == (tmp_path / "docs" / "results.md").read_text()
    assert "\n| far | " in (readme := (tmp_path / "README.md").read_text()) and "old" not in readme
    assert f"| women | {found[0].sum()} |" in text
    real = {name: int(found) for name, found in re.findall(r"\| (a|b|all) \| (?:21|42) \| (\d+) \|", text)}
    assert real["all"] == real["a"] + real["b"] > 36  # of 42: some drawn faces are not found
    assert "Faces detected: " in text and " of 182 (" in text  # 28 of each of six runs, and 14 more at w = 0
    assert text.count("| paper: ") == 6
