"""train_autoencoder.py and train_diffusion.py end to end, on drawn faces, tiny networks and a tiny recogniser."""
import csv
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_autoencoder
import train_diffusion
from models.autoencoder import Autoencoder
from models.published import load_diffusion, load_first_stage
from models.unet import ConditionalUNet
from tests.drawn_face import draw_face
from tests.tiny_generator import TinyRecogniser
from utils.identities import contexts
from utils.recognition.recogniser_training import loop as generator_training
from utils.runtime.errors import UserError
from utils.runtime.ranks import Ranks

ROOT = Path(__file__).parents[2]
SCRIPTS = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}
PEOPLE, IMAGES, SIZE = 8, 3, 32
SETTINGS = {
    "device": "cpu", "training.name": "t", "training.image_size": SIZE, "training.compile": "false",
    "training.precision": "fp32", "training.held_out_identities": 4, "autoencoder.channels": "32,32,32",
    "autoencoder.codes": 32, "autoencoder.batch_size": 4, "autoencoder.minutes": 0, "autoencoder.steps": 10,
    "diffusion.initial_channels": 32, "diffusion.channel_multipliers": "1,2", "diffusion.context_channels": 32,
    "diffusion.batch_size": 4, "diffusion.minutes": 0, "diffusion.steps": 8, "diffusion.validations": 2,
}


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """A folder as people have them: names with spaces and unicode, a broken image, one without a face."""
    folder = tmp_path_factory.mktemp("my faces é")
    generator = np.random.default_rng(0)
    for i in range(PEOPLE):
        person = folder / f"Zoë {i}"
        person.mkdir()
        skin = tuple(generator.integers(150, 240, 3).tolist())
        for k in range(IMAGES):
            image = draw_face(96 + 16 * k, skin)
            Image.fromarray(image).save(person / f"{k}.png")
    (folder / "Zoë 0" / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (80, 80), (40, 90, 200)).save(folder / "Zoë 1" / "wall.png")
    return folder


@pytest.fixture(scope="module")
def output(faces, tmp_path_factory) -> Path:
    """An output folder in which the faces were found and the first stage was trained already."""
    folder = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        run("autoencoder", patch, faces, folder)
    return folder


def arguments(faces: Path, output: Path, **settings: object) -> list[str]:
    chosen = SETTINGS | {"training.faces": faces, "paths.output": output,
                         "training.recogniser": __file__,  # some file
                         "model.first_stage_encoder": output / "training" / "t" / "first_stage_encoder.safetensors",
                         "model.first_stage_decoder": output / "training" / "t" / "first_stage_decoder.safetensors",
                         } | settings
    return [f"{name}={value}" for name, value in chosen.items()]


def run(stage: str, monkeypatch, faces: Path, output: Path, **settings: object) -> Path:
    script = SCRIPTS[stage]
    monkeypatch.setattr(script, "load_backbone", lambda file: TinyRecogniser())
    monkeypatch.setattr(script, "REPORT_SECONDS", -1)  # the loss of every step
    monkeypatch.setattr(sys, "argv", ["script", *arguments(faces, output, **settings)])
    script.main()
    return output / "training" / str(settings.get("training.name", "t"))


def losses(folder: Path, stage: str) -> np.ndarray:
    with open(folder / f"{stage}.csv", encoding="utf-8") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def own_copy(output: Path, folder: Path) -> Path:
    """A copy of the trained first stage and of the caches, to train in."""
    shutil.copytree(output, folder)
    return folder


# ---- both scripts ----------------------------------------------------------------------------------------------------

def test_what_the_first_stage_leaves(output):
    folder = output / "training" / "t"
    autoencoder = load_first_stage(folder / "first_stage_encoder.safetensors", folder / "first_stage_decoder.safetensors")
    crops = np.load(output / "faces" / "my faces é0" / "crops-32-margin12.npy")
    assert crops.shape == (PEOPLE * IMAGES, SIZE, SIZE, 3)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    latents = autoencoder.encode(images)
    assert latents.shape == (PEOPLE * IMAGES, 4, 8, 8)
    trained_on = latents.detach()[np.repeat(np.arange(PEOPLE) % 2 == 1, IMAGES)]  # every other person is held out
    assert trained_on.mean(dim=(0, 2, 3)).abs().max() < 1e-3  # the codes' distance is measured in these units
    torch.testing.assert_close(trained_on.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-2)
    assert (latents - autoencoder.quantize(latents)).square().mean() < 0.3  # 32 codes in 4 dimensions
    assert len(losses(folder, "autoencoder")) == 10
    assert Image.open(folder / "autoencoder.png").size[1] == 2 * 96


def test_images_without_a_face_are_listed(output):
    with open(output / "faces" / "my faces é0" / "failures.csv", encoding="utf-8") as file:
        failures = {row["image"]: row["reason"] for row in csv.DictReader(file)}
    assert failures.keys() == {"broken.jpg", "wall.png"}
    assert failures["wall.png"] == "no face found"


@pytest.mark.parametrize("stage, killed_at", [("autoencoder", 3), ("autoencoder", 8), ("diffusion", 1), ("diffusion", 5)])
def test_killed_and_continued_it_follows_the_same_curve(stage, killed_at, output, faces, tmp_path, monkeypatch):
    whole = run(stage, monkeypatch, faces, own_copy(output, tmp_path / "whole"), **{"training.name": "whole"})
    script, calls = SCRIPTS[stage], []
    monkeypatch.setattr(script, "SAVE_SECONDS", -1)
    average_gradients = script.average_gradients

    def killed(*args):
        calls.append(1)
        if len(calls) == killed_at:
            raise Killed
        average_gradients(*args)

    copy = own_copy(output, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(script, "average_gradients", killed)
        with pytest.raises(Killed):
            run(stage, patch, faces, copy, **{"training.name": "whole"})
    continued = run(stage, monkeypatch, faces, copy, **{"training.name": "whole"})
    np.testing.assert_allclose(losses(continued, stage), losses(whole, stage), rtol=0, atol=1e-5)
    assert losses(whole, stage).std() > 1e-3


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_seed_decides_the_weights(stage, output, faces, tmp_path, monkeypatch):
    name = {"autoencoder": "first_stage_decoder.safetensors",
            "diffusion": "checkpoints/ema_averaged_model.safetensors"}[stage]

    def weights(folder: str, seed: int) -> dict[str, torch.Tensor]:
        copy = own_copy(output, tmp_path / folder)
        settings = {"training.name": folder, "training.seed": seed, f"{stage}.steps": 3}
        return load_file(run(stage, monkeypatch, faces, copy, **settings) / name)

    once, again, other = weights("once", 0), weights("again", 0), weights("other", 1)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert any(not torch.equal(once[key], other[key]) for key in once)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_ranks_agree_with_one(stage, output, faces, tmp_path, monkeypatch):
    # 16: an eighth of each rank's batch, judged by the identity loss, is an eighth of the whole one
    settings = {"training.name": "r", f"{stage}.steps": 5, "diffusion.context_dropout": 0, "diffusion.batch_size": 16}
    alone = run(stage, monkeypatch, faces, own_copy(output, tmp_path / "alone"), **settings)
    together = own_copy(output, tmp_path / "together")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                    "tests.tiny_generator", f"train_{stage}", *arguments(faces, together, **settings)],
                   cwd=ROOT, check=True, capture_output=True, timeout=300)
    first = slice(0, 3)  # of the autoencoder, before the codebook is fitted
    np.testing.assert_allclose(losses(together / "training" / "r", stage)[first], losses(alone, stage)[first],
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage, settings, words", [
    ("autoencoder", {"autoencoder.codes": 100_000}, "autoencoder.codes: 100000 is more than the 768 latents"),
    ("autoencoder", {"training.held_out_identities": 7}, "training.held_out_identities: 7 cannot be set apart from 8"),
    ("autoencoder", {"training.faces": "nowhere"}, "nowhere: no such folder"),
    ("diffusion", {"model.first_stage_encoder": "none.pt", "training.name": "other"}, "none.pt: no such file"),
])
def test_what_cannot_be_is_refused(stage, settings, words, output, faces, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=words):
        run(stage, monkeypatch, Path(settings.get("training.faces", faces)), own_copy(output, tmp_path / "o"),
            **({"training.name": "new"} | settings))


def test_one_person_and_no_face_are_refused_in_one_line(faces, tmp_path, monkeypatch):
    one = tmp_path / "one"
    (one / "Ann").mkdir(parents=True)
    for k in range(3):
        Image.fromarray(draw_face(96 + k)).save(one / "Ann" / f"{k}.png")
    with pytest.raises(UserError, match="cannot be set apart from 1 identities; give the faces of at least 4 people"):
        run("autoencoder", monkeypatch, one, tmp_path / "o")
    for file in (one / "Ann").iterdir():
        Image.new("RGB", (80, 80), (40, 90, 200)).save(file)
    with pytest.raises(UserError, match="no face was found in its 3 images"):
        run("autoencoder", monkeypatch, one, tmp_path / "o2")


# ---- the diffusion model ---------------------------------------------------------------------------------------------

def test_the_saved_network_takes_unit_contexts(output, faces, tmp_path, monkeypatch):
    # validated once, at the end: of several checkpoints the best is kept, whichever that is
    settings = {"diffusion.steps": 3, "diffusion.validations": 1}
    folder = run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / "o"), **settings)
    unet, settings = load_diffusion(folder)
    assert settings["prediction"] == "v" and settings["latent_shape"] == (4, 8, 8)
    state = torch.load(folder / "diffusion_state.pt", weights_only=True)
    trained = ConditionalUNet(4, 32, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1).eval()
    trained.load_state_dict(state["average"])
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.nn.functional.normalize(torch.randn(2, 16))
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, c), trained(x, t, 4 * c), rtol=1e-4, atol=1e-5)
    again = train_diffusion.trained_weights(folder, trained, context_scale=4, prediction="v")
    assert all(torch.equal(again[name], weight) for name, weight in state["average"].items())
    with pytest.raises(UserError, match="diffusion.start_from: .* is another network"):
        train_diffusion.trained_weights(folder, ConditionalUNet(4, 64, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16,
                                                                32, False, 0.1), context_scale=4, prediction="v")
    with pytest.raises(UserError, match="diffusion.start_from: .* is another network.*predicts v"):
        train_diffusion.trained_weights(folder, trained, context_scale=4, prediction="eps")
    ids, held_out = contexts.read(folder / "held_out_contexts.npz")
    assert len(ids) == 2 and held_out.shape == (2, 16)
    statistics = np.load(folder / "context_statistics.npz")
    assert statistics["mean"].shape == (16,) and statistics["covariance"].shape == (16, 16)


def test_the_paper_s_way_trains_too(output, faces, tmp_path, monkeypatch):
    settings = {"prediction": "eps", "scale_contexts": "false", "null_contexts": 0, "same_person": 0, "context_noise": 0,
                "latent_noise": 0, "optimizer": "adam", "schedule": "warm_restarts", "learning_rate": 1e-4, "steps": 6,
                "identity": 0}
    folder = run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / "o"),
                 **{f"diffusion.{name}": value for name, value in settings.items()})
    assert load_diffusion(folder)[1]["prediction"] == "eps"
    assert losses(folder, "diffusion")[0] == pytest.approx(1, abs=0.15)  # an eps of zeros misses noise of variance 1


def test_the_identity_loss_reaches_the_network(output, faces, tmp_path, monkeypatch):
    def first_loss(name: str, weight: float) -> float:
        settings = {"diffusion.identity": weight, "training.name": name, "diffusion.steps": 2}
        return losses(run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / name), **settings), "diffusion")[0]

    plain, half, whole = first_loss("none", 0), first_loss("half", 0.5), first_loss("whole", 1)
    assert whole - plain == pytest.approx(2 * (half - plain), rel=1e-3) and 0 < whole - plain <= 2


def test_partners_are_of_the_same_person():
    labels = np.array([0, 1, 1, 1, 2, 2, 5])
    partners = train_diffusion.Partners(labels)
    numbers = np.repeat(np.arange(len(labels)), 500)
    uniform = np.random.default_rng(0).random(len(numbers))
    other = partners.other(numbers, uniform)
    assert (labels[other] == labels[numbers]).all()
    alone = np.isin(numbers, (0, 6))
    assert (other[alone] == numbers[alone]).all() and (other[~alone] != numbers[~alone]).all()
    assert np.bincount(other[numbers == 2], minlength=4)[[1, 3]] == pytest.approx(250, abs=60)


# ---- pieces ----------------------------------------------------------------------------------------------------------

def test_learning_rates():
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=2)
    for step in range(75):
        assert generator_training.warm_restarts(step, first=10) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()
    rates = [generator_training.flat_then_cosine(progress) for progress in (0, 0.01, 0.02, 0.59, 0.8, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_the_average_averages():
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    average, expected = generator_training.Average(network), 1.0
    for step, value in enumerate((2.0, -3.0, 5.0), start=1):
        network.weight.data.fill_(value)
        average.update(network, step)
        decay = 1 - (1 + step) ** -0.75
        expected = decay * expected + (1 - decay) * value
    assert average.weights["weight"].item() == pytest.approx(expected, abs=1e-6)
    average.update(network, 10**9)
    assert average.weights["weight"].item() == pytest.approx(0.9999 * expected + 0.0001 * 5, abs=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_face_is_seen_once_an_epoch(world_size):
    seen = [generator_training.batch_rows(10, 4, 3, step, Ranks(rank, world_size, torch.device("cpu")))
            for step in range(5) for rank in range(world_size)]
    seen = np.stack(seen).reshape(5, world_size, -1).transpose(0, 2, 1).reshape(-1)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_ranks_share_the_draws_of_a_step():
    whole = generator_training.Draws(1, 7, 6, Ranks(0, 1, torch.device("cpu")))
    parts = [generator_training.Draws(1, 7, 6, Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for draw in (lambda draws: draws.normal(2, 3), lambda draws: draws.uniform(), lambda draws: draws.integers(1000)):
        expected, (a, b) = draw(whole), (draw(part) for part in parts)
        assert torch.equal(expected[0::2], a) and torch.equal(expected[1::2], b)


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_stops(loss, norm):
    with pytest.raises(UserError, match="state.pt: is from before step 7.*lower diffusion.learning_rate"):
        generator_training.check_finite(loss, torch.tensor(norm), Path("state.pt"), 7, "diffusion.learning_rate")
    generator_training.check_finite(1.0, torch.tensor(1.0), Path("state.pt"), 7, "diffusion.learning_rate")


def test_one_held_out_person_makes_no_impostor_pair():
    with pytest.raises(UserError, match="training.held_out_identities: 1 cannot"):
        generator_training.held_out(np.arange(10), 10, 1)


def test_normalising_latents_leaves_the_pictures_as_they_were():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), 1, 3, 3, 16).eval()
    autoencoder.vq.quant_conv.weight.data *= 7
    autoencoder.vq.quant_conv.bias.data += 5
    crops = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)

    def images(numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(crops[numbers]).permute(0, 3, 1, 2) / 127.5 - 1

    with torch.no_grad():
        before = train_autoencoder.reconstruct(autoencoder, images(np.arange(20)), quantised=False)
        train_autoencoder.quantise(autoencoder, crops, np.arange(20), images, Ranks(0, 1, torch.device("cpu")), 0)
        after = train_autoencoder.reconstruct(autoencoder, images(np.arange(20)), quantised=False)
        latents = autoencoder.encode(images(np.arange(20)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    assert not any(weight.requires_grad for weight in autoencoder.vq.encoder.parameters())
