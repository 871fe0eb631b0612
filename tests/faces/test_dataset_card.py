"""A sampled set is published as it is: its card says what it is, and common loaders take the folder."""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from PIL import Image
from torchvision.datasets import ImageFolder

from config import places
from config.load import resolve
from utils.faces.dataset_card import write_cards
from utils.faces.folders import identity_folders, other_files
from utils.runtime.files import write_json

NAMES = ["000000", "test", "train"]  # two of them mean something to a loader
METRICS = {"eer": .1, "fmr100": .2, "fmr1000": .3, "genuine_mean": .4, "impostor_mean": .05, "fdr": 4.535, "images": 6}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run of three identities x 2 images, sampled by the default settings and aligned."""
    folder = tmp_path / "far"
    for number, name in enumerate(NAMES):
        for k in range(2):
            pixels = np.full((8, 8, 3), 40 * number + k, np.uint8)
            for images in (places.samples(folder), places.aligned(folder)):
                (images / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(images / name / f"{k}.png")
    begin(folder)
    write_json(places.alignment_record(places.aligned(folder)), {"decides": {"align.images": ""}})
    for name in ("failures.csv", "kept.csv", "sources.csv"):
        (places.aligned(folder) / name).write_text("identity,image\n")
    return folder


def begin(folder: Path, **overrides: str) -> None:
    config = resolve({"preset": "demo"}, {name.replace("__", "."): value for name, value in overrides.items()})
    write_json(places.run_record(folder), {
        "decides": {"contexts": "c" * 64, "weights": ["1" * 64, "2" * 64, "3" * 64, "4" * 64]}, "config": asdict(config),
        "versions": {"torch": "2.14.1"}})


def text(folder: Path) -> str:
    return (places.samples(folder) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", [places.samples, places.aligned])
def test_loaders_take_the_folder_as_it_is(folder, place, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_cards(folder)
    published = shutil.copytree(place(folder), tmp_path / "published")
    faces = datasets.load_dataset(str(published), split="train", cache_dir=str(tmp_path / "cache"))
    assert faces.features["label"].names == NAMES and len(faces) == 6
    shown = sorted((NAMES[row["label"]], np.asarray(row["image"])[0, 0, 0].item()) for row in faces)
    assert shown == [(name, 40 * number + k) for number, name in enumerate(NAMES) for k in range(2)]

    faces = ImageFolder(str(published))
    assert faces.classes == NAMES and [label for _, label in faces.samples] == [0, 0, 1, 1, 2, 2]
    assert np.asarray(faces[5][0])[0, 0, 0] == 81


def test_the_card_is_no_image_of_the_set(folder):
    before = identity_folders(places.samples(folder))
    write_cards(folder)
    assert identity_folders(places.samples(folder)) == before and other_files(places.samples(folder)) == []


def test_the_head_is_the_hubs(folder):
    begin(folder, paths__run='a "quoted": name')
    folder = folder.rename(folder.with_name('a "quoted": name'))
    write_cards(folder)
    data = DatasetCard(text(folder)).data.to_dict()
    assert data["pretty_name"] == 'a "quoted": name: synthetic faces'
    assert data["size_categories"] == ["n<1K"] and data["license"] == "other"
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "*/*.png"}]
    assert yaml.safe_load(text(folder).split("---")[1]) == data


def test_the_card_says_how_the_set_was_made_and_what_was_measured(folder):
    write_cards(folder)
    assert "of people who do not exist" in text(folder) and "6 synthetic face images of 3 identities, 8 x 8 px" in text(folder)
    assert "Labeled Faces in the Wild" in text(folder) and f"| first stage, decoder | `{'4' * 64}` |" in text(folder)
    assert "by NegFaceDiff's sampling" in text(folder)
    assert "| guidance.w | 0.5 |" in text(folder) and "Not measured yet" in text(folder)
    write_json(folder / "scores" / "mine" / "metrics.json", METRICS)
    write_cards(folder)
    assert "| mine | 6 | 0.1000 | 0.2000 | 0.3000 | 0.4000 | 0.0500 | 4.5350 |" in text(folder)
    assert "Not measured yet" not in text(folder)
    write_json(folder / "scores" / "mine" / "scores.json", {"kept": "of an earlier selection"})
    write_cards(folder)
    assert "| mine |" not in text(folder) and "Not measured yet" in text(folder)
    begin(folder, guidance__w="0")
    write_cards(folder)
    assert "NegFaceDiff's sampling" not in text(folder) and "without negative contexts (w = 0" in text(folder)


def test_a_card_does_not_claim_what_is_not_known(folder):
    """Contexts of real people draw people who resemble them, and whose weights these are is for their owner to say."""
    begin(folder, contexts__source="extracted", contexts__faces="/home/me/friends", model__diffusion="/home/me/weights")
    write_cards(folder)
    assert "do not exist" not in text(folder) and "of real people" in text(folder) and "`friends`" in text(folder)
    assert "`weights`. Before this set is published" in text(folder) and "/home" not in text(folder)


def test_photographs_get_no_card(folder):
    write_json(places.alignment_record(places.aligned(folder)), {"decides": {"align.images": "data/my-photos"}})
    write_cards(folder)
    assert not (places.aligned(folder) / "README.md").exists() and text(folder)
    places.run_record(folder).unlink()
    os.unlink(places.samples(folder) / "README.md")
    write_cards(folder)
    assert not (places.samples(folder) / "README.md").exists()


@pytest.mark.parametrize("config", [None, {"sampling": {"no such setting": 1}}])
def test_a_run_of_another_version_gets_none_and_says_so(folder, capsys, config):
    record = json.loads(places.run_record(folder).read_text())
    write_json(places.run_record(folder), record | {"config": config})
    write_cards(folder)
    assert "gets no dataset card (" in capsys.readouterr().out and not (places.samples(folder) / "README.md").exists()
