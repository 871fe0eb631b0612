"""The training script end to end, on made-up faces and a network of some thousand parameters (tests.tiny_training)."""
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_fr
from models.backbones import BACKBONES
from tests.running import killed_at as killed
from tests.tiny_training import TinyNet
from utils.faces.aligned import write_kept
from utils.recognition import dynunc, recogniser_training
from utils.runtime.errors import UserError
from utils.training import loop

ROOT = Path(__file__).parents[2]
KEEP = (0.8, 0.5, 0.1)
IDENTITIES, IMAGES, HELD_OUT = 9, 5, 3  # 30 images to train on, of 6 people


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    generator = np.random.default_rng(0)
    for i in range(IDENTITIES):
        (folder / f"person{i}").mkdir()
        person = np.kron(generator.integers(0, 256, (7, 7, 3)), np.ones((16, 16, 1)))
        for k in range(IMAGES):
            image = np.clip(person + generator.normal(0, 60, person.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"person{i}" / f"{k}.png")
    return folder


def arguments(output: Path, faces: Path, **settings: object) -> list[str]:
    chosen = {"images": faces, "backbone": "iresnet18", "batch_size": 8, "epochs": 3, "learning_rate": 3.0,
              "name": "t"} | settings
    return ["device=cpu", f"paths.output={output}", "paths.run=run", "training.precision=fp32",
            f"training.compile={chosen.pop('compile', False)}"] + [f"fr.{k}={v}" for k, v in chosen.items()]


@pytest.fixture
def train(faces, monkeypatch):
    """Run the script in this process; returns the folder that it wrote."""
    def run(output: Path, **settings: object) -> Path:
        monkeypatch.setitem(BACKBONES, "iresnet18", TinyNet)
        monkeypatch.setattr(recogniser_training, "HELD_OUT_PART", IDENTITIES // HELD_OUT)
        monkeypatch.setattr(dynunc, "WINDOW", 3)
        monkeypatch.setattr(dynunc, "KEEP_FRACTIONS", KEEP)
        monkeypatch.setattr(sys, "argv", ["train_fr.py", *arguments(output, faces, **settings)])
        train_fr.main()
        return output / "run" / "fr" / str(settings.get("name", "t"))
    return run


def read_log(folder: Path) -> dict[str, list[float]]:
    rows = list(csv.DictReader((folder / "log.csv").open()))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_writes_what_it_promises_and_learns(train, tmp_path):
    folder = train(tmp_path, epochs=12, milestones="4,8")
    log = read_log(folder)
    assert log["epoch"] == list(range(1, 13))
    assert log["loss"][-1] < 0.5 * log["loss"][0]
    rate = 3.0 * 8 / 512
    np.testing.assert_allclose(log["learning_rate"], [rate] * 4 + [rate / 10] * 4 + [rate / 100] * 4)
    best = int(np.argmax(log["held_out_accuracy"])) + 1
    weights = load_file(folder / "backbone.safetensors")
    published = torch.load(folder / f"{3 * best}backbone.pth", weights_only=True)  # 3 steps an epoch
    assert weights.keys() == published.keys() == TinyNet(0.4).state_dict().keys()
    assert all(torch.equal(weights[name], published[name]) for name in weights)
    assert Image.open(folder / "curves.png").size[0] > 500
    assert len(json.loads((folder / "held_out.json").read_text())) == HELD_OUT


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 4, 5, 9])
def test_killed_within_an_epoch_it_goes_on_as_if_nothing_had_been(train, tmp_path, monkeypatch, killed_at):
    settings = {"augmentation": "randaugment", "is_original_train": "true"}
    whole = train(tmp_path / "whole", **settings)

    monkeypatch.setattr(loop, "CHECK_STEPS", 2)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    with killed(killed_at, loop.Training, "_update"):
        train(tmp_path / "killed", **settings)
    folder = train(tmp_path / "killed", **settings)
    assert_same_training(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("module, write, number", [(loop, "write_torch", 1), (loop, "write_torch", 2),
                                                   (train_fr, "write_safetensors", 1), (loop, "write_csv", 2)])
def test_killed_while_saving_it_goes_on_as_if_nothing_had_been(train, tmp_path, module, write, number):
    settings = {"is_original_train": "true"}
    whole = train(tmp_path / "whole", **settings)
    with killed(number, module, write):
        train(tmp_path / "killed", **settings)
    assert_same_training(train(tmp_path / "killed", **settings), whole)


def assert_same_training(folder: Path, whole: Path) -> None:
    log, expected = read_log(folder), read_log(whole)
    for column in ("epoch", "loss", "held_out_accuracy", "learning_rate"):
        np.testing.assert_allclose(log[column], expected[column], rtol=1e-5)
    weights, expected = (load_file(f / "backbone.safetensors") for f in (folder, whole))
    for name in weights:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.load(folder / "probabilities.npy"), np.load(whole / "probabilities.npy"), rtol=1e-5)
    assert (folder / "keep_0.5.txt").read_text() == (whole / "keep_0.5.txt").read_text()


@pytest.mark.slow
def test_two_ranks_train_as_one_does_on_their_whole_batch(train, faces, tmp_path, monkeypatch):
    settings = {"is_original_train": "true"}
    monkeypatch.setattr(train_fr, "DROPOUT", 0.0)
    alone = train(tmp_path / "alone", **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "tests.tiny_training", *arguments(tmp_path / "two", faces, batch_size=4, **settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = tmp_path / "two" / "run" / "fr" / "t"
    log, expected = read_log(together), read_log(alone)
    np.testing.assert_allclose(log["loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(log["held_out_accuracy"], expected["held_out_accuracy"], atol=1e-3)
    probabilities, expected = np.load(together / "probabilities.npy"), np.load(alone / "probabilities.npy")
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3, atol=1e-5)
    assert (np.isnan(probabilities).sum(axis=1) == 30 % 8).all()
    assert done.stdout.count("epoch 1,") == 1


@pytest.mark.parametrize("images, batch_size, world_size", [(100, 8, 2), (96, 8, 3), (7, 7, 1), (1000, 3, 4)])
def test_ranks_see_each_image_at_most_once_and_drop_less_than_a_batch(images, batch_size, world_size):
    order, dropped = recogniser_training.epoch_order(images, batch_size * world_size, seed=1, epoch=0)
    seen = [order[:, rank * batch_size:(rank + 1) * batch_size].ravel() for rank in range(world_size)]
    assert len({len(part) for part in seen}) == 1
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together)
    assert len(dropped) < batch_size * world_size
    assert sorted(np.concatenate([together, dropped])) == list(range(images))
    again, _ = recogniser_training.epoch_order(images, batch_size * world_size, seed=1, epoch=1)
    assert not np.array_equal(order, again)
    counts = np.zeros(images, dtype=int)
    for epoch in range(10):
        np.add.at(counts, recogniser_training.epoch_order(images, batch_size * world_size, seed=1, epoch=epoch)[1], 1)
    assert counts.max() - counts.min() <= 1
    with pytest.raises(UserError, match="fr.batch_size"):
        recogniser_training.epoch_order(images, images + 1, seed=1, epoch=0)


@pytest.mark.slow
def test_plateau_decays_and_stops_on_the_held_out_people(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_fr, "PATIENCE", 1)
    monkeypatch.setattr(train_fr, "EARLY_STOP", 5)
    log = read_log(train(tmp_path, epochs=30, learning_rate=1e-4))
    assert len(set(log["held_out_accuracy"])) == 1  # too small a rate to change anything: no epoch beats the first
    rate = 1e-4 * 8 / 512
    np.testing.assert_allclose(log["learning_rate"], [rate, rate, rate, rate / 10, rate / 10, rate / 100])


def test_a_loss_that_is_not_finite_stops_with_a_good_state(train, tmp_path):
    with pytest.raises(UserError, match="is from before step 3, .*not finite any more.*lower fr.learning_rate"):
        train(tmp_path, learning_rate=1e38)
    state = torch.load(tmp_path / "run" / "fr" / "t" / "state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["backbone"].values())


@pytest.mark.slow
def test_dynunc_files_and_a_training_on_a_keep_list(train, tmp_path, capsys):
    folder = train(tmp_path, is_original_train="true", epochs=4)
    probabilities = np.load(folder / "probabilities.npy", mmap_mode="r")
    assert probabilities.shape == (4, 30) and probabilities.dtype == np.float32
    seen = probabilities[~np.isnan(probabilities)]
    assert len(seen) == 4 * 24 and (seen > 0).all() and (seen <= 1).all()
    with np.load(folder / "dynunc_scores.npz") as scores:
        paths, uncertainty = scores["paths"], scores["scores"]
    held_out = set(json.loads((folder / "held_out.json").read_text()))
    assert len(paths) == 30 and not held_out & {path.split("/")[0] for path in paths}
    kept = (folder / "keep_0.8.txt").read_text().split()
    assert kept == [paths[i] for i in sorted(np.argsort(-uncertainty, kind="stable")[:24])]

    capsys.readouterr()
    second = train(tmp_path, name="kept", keep_list=folder / "keep_0.8.txt")
    assert "trained on 24 images" in capsys.readouterr().out
    assert json.loads((second / "held_out.json").read_text()) == json.loads((folder / "held_out.json").read_text())
    train(tmp_path, name="few", keep_list=folder / "keep_0.1.txt", batch_size=3)
    people = {path.split("/")[0] for path in (folder / "keep_0.1.txt").read_text().split()}
    output = capsys.readouterr().out
    assert f"{6 - len(people)} identities have no image in" in output
    assert f"3 images of {len(people)} people" in output


@pytest.mark.slow
def test_probabilities_are_those_of_the_training_pass(train, tmp_path, monkeypatch):
    """At a learning rate of nothing, without dropout and augmentation: the softmax of s cos, worked out from the weights."""
    monkeypatch.setattr(train_fr, "DROPOUT", 0.0)
    folder = train(tmp_path, learning_rate=1e-30, augmentation="none", is_original_train="true", scale=8.0)
    state = torch.load(folder / "state.pt", weights_only=True)
    backbone = TinyNet(0.0).eval()
    backbone.load_state_dict(state["backbone"])
    packed = next((tmp_path / "run" / "fr").glob("*.npy"))
    with np.load(packed.with_suffix(".index.npz")) as index, torch.no_grad():
        held_out = json.loads((folder / "held_out.json").read_text())
        trained = [k for k, path in enumerate(index["paths"]) if path.split("/")[0] not in held_out]
        images = torch.from_numpy(np.load(packed)[trained]).permute(0, 3, 1, 2).double() / 127.5 - 1
        embeddings = torch.nn.functional.normalize(backbone.double()(images))
        centres = torch.nn.functional.normalize(state["head"]["weight"].double())
        classes = np.unique([index["paths"][k].split("/")[0] for k in trained], return_inverse=True)[1]
        expected = (8 * embeddings @ centres.T).softmax(1)[torch.arange(30), torch.from_numpy(classes)]
    for row in np.load(folder / "probabilities.npy"):
        shown = ~np.isnan(row)
        np.testing.assert_allclose(row[shown], expected[shown], rtol=1e-4)


@pytest.mark.slow
def test_more_epochs_extend_a_finished_training(train, tmp_path):
    whole = train(tmp_path / "whole", epochs=4, is_original_train="true")
    train(tmp_path / "three", epochs=3, is_original_train="true")
    extended = train(tmp_path / "three", epochs=4, is_original_train="true")
    assert_same_training(extended, whole)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["arcface", "adaface"])
def test_the_other_heads_learn_too(train, tmp_path, head):
    log = read_log(train(tmp_path, epochs=8, head=head, margin=0.2, milestones="100"))
    assert log["loss"][-1] < 0.7 * log["loss"][0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
def test_compiled_it_learns_the_same(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_fr, "DROPOUT", 0.0)
    eager, compiled = (read_log(train(tmp_path / str(compile), compile=compile, epochs=2))
                       for compile in (False, True))  # no dropout: a compiled network draws otherwise
    assert compiled["loss"] == pytest.approx(eager["loss"], abs=1e-3)


def test_what_cannot_be_is_refused_in_one_line(train, faces, tmp_path):
    def refused(words: str, **settings: object) -> None:
        with pytest.raises(UserError, match=words) as error:
            train(tmp_path, **settings)
        assert "\n" not in str(error.value)

    refused("2 of 3 people, 3 of whom are eligible, cannot be held out", identities=3)
    refused("fr.batch_size: one batch on all devices takes 31 images, there are 30", batch_size=31, name="large")
    refused("absent.txt: no such file .fr.keep_list.", keep_list=tmp_path / "absent.txt")
    (tmp_path / "list.txt").write_text("person0/0.png\nnobody/0.png\n")
    refused("list.txt:2: 'nobody/0.png' is not there to be chosen .fr.keep_list.", keep_list=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("")
    refused("list.txt: names no image to train on .fr.keep_list.", keep_list=tmp_path / "list.txt")
    folder = train(tmp_path, epochs=1)
    refused("fr.learning_rate = 3.0, now it is 2.0; set fr.name to another name", learning_rate=2.0)
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])
    refused("state.pt: is damaged", epochs=2)
    folder = train(tmp_path, epochs=1, name="lost")
    (folder / "backbone.safetensors").unlink()
    refused("backbone.safetensors: no such file .the best weights", epochs=1, name="lost")


def test_the_faces_that_stage_4_kept_are_trained_on(train, faces, tmp_path, capsys):
    aligned = tmp_path / "run" / "aligned"
    shutil.copytree(faces, aligned)
    write_kept(aligned, {f"person{i}": [aligned / f"person{i}" / f"{k}.png" for k in range(2)] for i in range(1, 7)})
    train(tmp_path, images="", batch_size=3, epochs=1)
    assert "trained on 8 images of 4 people" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named_before_anything_is_trained(train, tmp_path):
    folder = tmp_path / "faces"
    for i in range(5):
        (folder / str(i)).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (112, 112), (40 * i, 0, 0)).save(folder / str(i) / f"{k}.png")
    (folder / "3" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="3/1.png: is not a readable image"):
        train(tmp_path, images=folder)
    assert not (tmp_path / "run" / "fr" / "t").exists()
