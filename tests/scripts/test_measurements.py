"""The measurements in experiments/ from folder to result, on drawn faces and the included weights."""
import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import align
from experiments import demo_embed, demo_recogniser, memorisation, reconstruction
from models.published import load_backbone
from tests.drawn_face import draw_face
from tests.running import run
from utils.training import faces as training_faces

pytestmark = pytest.mark.slow
DEMO = demo_embed.DEMO


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`real`: eight people, two images each; `run`: aligned copies of the first image of two who are trained on."""
    root = tmp_path_factory.mktemp("measurements")
    for person in range(8):
        skin = tuple(np.random.default_rng(person).integers(90, 240, 3).tolist())
        for k in range(2):
            file = root / "real" / f"p{person}" / f"p{person}_{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_face(140 + 20 * k, skin)).save(file)
    for person in (1, 2):
        shutil.copytree(root / "real" / f"p{person}", root / "copies" / f"p{person}", ignore=lambda *_: [f"p{person}_1.png"])
    run(align, f"paths.output={root / 'o'}", "paths.run=copies", f"align.images={root / 'copies'}", "align.minimum_face=30")
    return root


def settings(root: Path, *others: str) -> list[str]:
    return [f"training.faces={root / 'real'}", f"paths.output={root / 'o'}", "align.minimum_face=30", "device=cpu",
            "training.compile=false", "training.name=small", *others]


def test_a_copy_of_a_training_face_is_found(folders, capsys):
    run(memorisation, *settings(folders, "scores.overlay=copies"))
    with open(folders / "o" / "memorisation" / "nearest.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["generated"], row["training_face"]) for row in rows} == {
        (f"p{person}/p{person}_0.png", f"p{person}_0.png") for person in (1, 2)}
    assert min(float(row["similarity"]) for row in rows) > 0.999
    assert "copies: median 1.000, 99th percentile 1.000, highest 1.000 of 2" in capsys.readouterr().out
    assert Image.open(folders / "o" / "memorisation" / "nearest.png").size == (2 * 96, 2 * 96)


def test_the_first_stage_is_measured_beside_linear_maps(folders, capsys):
    run(reconstruction, *settings(folders))
    shown = capsys.readouterr().out
    psnr = {name: float(value) for name, value in re.findall(r"^(.*): PSNR ([\d.]+) dB", shown, re.M)}
    assert list(psnr) == ["with the codebook", "without", *(f"linear, blocks of {block} px" for block in (4, 8, 16))]
    assert 15 < psnr["with the codebook"] < 35
    assert psnr["linear, blocks of 4 px"] < psnr["linear, blocks of 16 px"]  # drawn faces differ in little but colour
    height = Image.open(folders / "o" / "reconstruction" / "demo.png").size[1]
    assert height == 6 * 96  # the faces and five reconstructions


def test_a_student_learns_the_recogniser_and_the_weights_are_taken_in(folders, monkeypatch, tmp_path, capsys):
    for name, value in {"BATCH_SIZE": 4, "VALIDATIONS": 1}.items():
        monkeypatch.setattr(demo_recogniser, name, value)
    monkeypatch.setattr(training_faces, "HELD_OUT_PART", 4)
    run(demo_recogniser, *settings(folders), "training.length=0.05min")
    folder = folders / "o" / "training" / "small"
    student = load_backbone(folder / "recogniser.safetensors")
    with torch.no_grad():
        assert student(torch.zeros(1, 3, 112, 112)).shape == load_backbone(DEMO / "recogniser.safetensors")(
            torch.zeros(1, 3, 112, 112)).shape
    run(demo_recogniser, *settings(folders))
    assert "recogniser.safetensors: exists; set another training.name for a new one" in capsys.readouterr().out

    for name in (*demo_embed.WEIGHTS[:-1], *demo_embed.OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO / name, folder / name)
    monkeypatch.setattr(demo_embed, "DEMO", tmp_path / "demo")
    run(demo_embed, str(folder))
    for name in demo_embed.WEIGHTS[:-1]:  # they were in half precision before
        assert (tmp_path / "demo" / name).read_bytes() == (DEMO / name).read_bytes()
    before, after = (load_file(place / "recogniser.safetensors") for place in (folder, tmp_path / "demo"))
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor.half() if tensor.is_floating_point() else tensor, rtol=0, atol=0)
