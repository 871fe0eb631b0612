"""train_autoencoder.py and train_diffusion.py end to end, on drawn faces, tiny networks and a tiny recogniser."""
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

import train_autoencoder
import train_diffusion
from models.published import load_diffusion, load_first_stage
from models.published_writer import trained_weights
from models.sizes import SIZES
from models.unet import ConditionalUNet
from tests.drawn_face import draw_face
from tests.running import killed_at as killed
from tests.tiny_generator import TINY, shrink
from utils.identities import contexts
from utils.runtime.errors import UserError
from utils.training import extras, loop

ROOT = Path(__file__).parents[2]
SCRIPTS = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}
PEOPLE, IMAGES, SIZE = 8, 3, TINY["image_size"]
SETTINGS = {"device": "cpu", "training.name": "t", "training.size": "tiny", "training.compile": "false",
            "training.precision": "fp32", "diffusion.batch_size": 4}
STEPS = {"autoencoder": 10, "diffusion": 8}


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


def arguments(stage: str, faces: Path, output: Path, **settings: object) -> list[str]:
    chosen = SETTINGS | {"training.faces": faces, "paths.output": output, "training.length": f"{STEPS[stage]}steps",
                         "contexts.recogniser": __file__,  # some file
                         "model.first_stage_encoder": output / "training" / "t" / "first_stage_encoder.safetensors",
                         "model.first_stage_decoder": output / "training" / "t" / "first_stage_decoder.safetensors",
                         } | settings
    return [f"{name}={value}" for name, value in chosen.items()]


def run(stage: str, monkeypatch, faces: Path, output: Path, **settings: object) -> Path:
    script = SCRIPTS[stage]
    shrink(script, monkeypatch.setattr)
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(sys, "argv", ["script", *arguments(stage, faces, output, **settings)])
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

@pytest.mark.slow
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


@pytest.mark.slow
def test_images_without_a_face_are_listed(output):
    with open(output / "faces" / "my faces é0" / "failures.csv", encoding="utf-8") as file:
        failures = {row["image"]: row["reason"] for row in csv.DictReader(file)}
    assert failures.keys() == {"broken.jpg", "wall.png"}
    assert failures["wall.png"] == "no face found"


@pytest.mark.slow
@pytest.mark.parametrize("stage, killed_at", [("autoencoder", 3), ("autoencoder", 9), ("diffusion", 1), ("diffusion", 5)])
def test_killed_and_continued_it_follows_the_same_curve(stage, killed_at, output, faces, tmp_path, monkeypatch):
    whole = run(stage, monkeypatch, faces, own_copy(output, tmp_path / "whole"), **{"training.name": "whole"})
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    copy = own_copy(output, tmp_path / "killed")
    with killed(killed_at, loop.Training, "_update"):
        run(stage, monkeypatch, faces, copy, **{"training.name": "whole"})
    continued = run(stage, monkeypatch, faces, copy, **{"training.name": "whole"})
    np.testing.assert_allclose(losses(continued, stage), losses(whole, stage), rtol=0, atol=1e-5)
    assert losses(whole, stage).std() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_seed_decides_the_weights(stage, output, faces, tmp_path, monkeypatch):
    name = {"autoencoder": "first_stage_decoder.safetensors",
            "diffusion": "checkpoints/ema_averaged_model.safetensors"}[stage]

    def weights(folder: str, seed: int) -> dict[str, torch.Tensor]:
        copy = own_copy(output, tmp_path / folder)
        settings = {"training.name": folder, "training.seed": seed, "training.length": "3steps"}
        return load_file(run(stage, monkeypatch, faces, copy, **settings) / name)

    once, again, other = weights("once", 0), weights("again", 0), weights("other", 1)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert any(not torch.equal(once[key], other[key]) for key in once)


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_ranks_agree_with_one(stage, output, faces, tmp_path, monkeypatch):
    # 16: an eighth of each rank's batch, judged by the identity loss, is an eighth of the whole one
    settings = {"training.name": "r", "training.length": "5steps", "diffusion.batch_size": 16}
    monkeypatch.setitem(TINY["unet"], "context_dropout_probability", 0.0)
    alone = run(stage, monkeypatch, faces, own_copy(output, tmp_path / "alone"), **settings)
    together = own_copy(output, tmp_path / "together")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                    "tests.tiny_generator", f"train_{stage}", *arguments(stage, faces, together, **settings)],
                   cwd=ROOT, check=True, capture_output=True, timeout=300)
    first = slice(0, 3)  # of the autoencoder, before the codebook is fitted
    np.testing.assert_allclose(losses(together / "training" / "r", stage)[first], losses(alone, stage)[first],
                               rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage, settings, words", [
    ("autoencoder", {"training.faces": "nowhere"}, "nowhere: no such folder"),
    ("autoencoder", {"training.length": "an hour"}, "training.length: 'an hour' is not a length"),
    ("diffusion", {"model.first_stage_encoder": "none.pt", "training.name": "other"}, "none.pt: no such file"),
])
def test_what_cannot_be_is_refused(stage, settings, words, output, faces, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=words):
        run(stage, monkeypatch, Path(settings.get("training.faces", faces)), own_copy(output, tmp_path / "o"),
            **({"training.name": "new"} | settings))


@pytest.mark.slow
def test_a_discriminator_judges_the_decoder_in_the_last_part(output, faces, tmp_path, monkeypatch):
    settings = {"training.name": "judged", "training.adversarial": 0.5}
    folder = run("autoencoder", monkeypatch, faces, own_copy(output, tmp_path / "o"), **settings)
    judged, plain = losses(folder, "autoencoder"), losses(output / "training" / "t", "autoencoder")
    np.testing.assert_array_equal(judged[:8], plain[:8])  # it is drawn after the autoencoder, and has no say in it yet
    assert (np.abs(judged[8:] - plain[8:]) > 0.1).all()
    state = torch.load(folder / "autoencoder_state.pt", weights_only=True)
    assert state["discriminator"]["0.weight"].shape == (32, 3, 4, 4)
    with pytest.raises(UserError, match="was made with training.adversarial = 0.5, now it is None"):
        run("autoencoder", monkeypatch, faces, tmp_path / "o", **{"training.name": "judged"})


@pytest.mark.slow
def test_more_codes_than_latents_are_refused(output, faces, tmp_path, monkeypatch):
    monkeypatch.setitem(TINY["first_stage"], "num_codes", 100_000)
    with pytest.raises(UserError, match="the 12 faces to train on have 768 latents, fewer than the 100000 codes"):
        run("autoencoder", monkeypatch, faces, own_copy(output, tmp_path / "o"), **{"training.name": "new"})


def test_one_person_and_no_face_are_refused_in_one_line(faces, tmp_path, monkeypatch):
    one = tmp_path / "one"
    (one / "Ann").mkdir(parents=True)
    for k in range(3):
        Image.fromarray(draw_face(96 + k)).save(one / "Ann" / f"{k}.png")
    with pytest.raises(UserError, match="2 of 1 people, .* cannot be held out .*; give the faces of more people"):
        run("autoencoder", monkeypatch, one, tmp_path / "o")
    for file in (one / "Ann").iterdir():
        Image.new("RGB", (80, 80), (40, 90, 200)).save(file)
    with pytest.raises(UserError, match="no face was found in its 3 images"):
        run("autoencoder", monkeypatch, one, tmp_path / "o2")


# ---- the diffusion model ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_people_held_out_of_several_folders_have_contexts_that_name_folders(output, faces, tmp_path, monkeypatch):
    shutil.copytree(faces, tmp_path / "more")
    folder = run("diffusion", monkeypatch, f"{faces},{tmp_path / 'more'}", own_copy(output, tmp_path / "o"),
                 **{"training.length": "1steps", "training.name": "both"})
    ids, _ = contexts.read(folder / "held_out_contexts.npz")
    assert ids == [f"more Zoë {number}" for number in (0, 2, 4, 6)]


@pytest.mark.slow
def test_the_saved_network_takes_unit_contexts(output, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(train_diffusion, "VALIDATIONS", 1)  # of several checkpoints the best is kept, whichever that is
    folder = run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / "o"), **{"training.length": "3steps"})
    unet, settings = load_diffusion(folder)
    assert settings["prediction"] == "v" and settings["latent_shape"] == (4, 8, 8)
    state = torch.load(folder / "diffusion_state.pt", weights_only=True)
    trained = ConditionalUNet(4, 32, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1).eval()
    for weight, shadow in zip(trained.parameters(), state["average"]["shadow_params"], strict=True):
        weight.data.copy_(shadow)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.nn.functional.normalize(torch.randn(2, 16))
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, c), trained(x, t, 4 * c), rtol=1e-4, atol=1e-5)
    again = trained_weights(folder, trained, scale=4, prediction="v")
    assert all(torch.equal(again[name], weight) for name, weight in trained.state_dict().items())
    with pytest.raises(UserError, match="diffusion.start_from: .* is another network"):
        trained_weights(folder, ConditionalUNet(4, 64, (1, 2), (False, True), -1, 32, 1, "CA", True, 0, 16, 32, False, 0.1),
                        scale=4, prediction="v")
    with pytest.raises(UserError, match="diffusion.start_from: .* is another network.*predicts v"):
        trained_weights(folder, trained, scale=4, prediction="eps")
    ids, held_out = contexts.read(folder / "held_out_contexts.npz")
    assert len(ids) == 2 and held_out.shape == (2, 16)
    statistics = np.load(folder / "context_statistics.npz")
    assert statistics["mean"].shape == (16,) and statistics["covariance"].shape == (16, 16)


@pytest.mark.slow
def test_the_average_is_that_of_every_update(output, faces, tmp_path, monkeypatch):
    """METHOD's average: decay 1 - (1 + n)^-0.75 at the n-th update after the first."""
    weights, step = [], loop.Training._update

    def watched(training, *args):
        step(training, *args)
        weights.append(training.parts["unet"].final.weight.detach().clone())

    monkeypatch.setattr(loop.Training, "_update", watched)
    folder = run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / "o"), **{"training.length": "5steps"})
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        decay = 1 - (1 + n) ** -0.75
        expected = decay * expected + (1 - decay) * weight
    average = dict(zip((name for name, _ in load_diffusion(folder)[0].named_parameters()),
                       torch.load(folder / "diffusion_state.pt", weights_only=True)["average"]["shadow_params"], strict=True))
    torch.testing.assert_close(average["final.weight"], expected, rtol=0, atol=1e-6)
    assert (weights[-1] - expected).abs().max() > 1e-5


@pytest.mark.slow
def test_the_paper_s_way_trains_too(output, faces, tmp_path, monkeypatch):
    folder = run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / "o"),
                 **{"extras.use": "", "extras.identity": 0, "diffusion.learning_rate": 1e-4, "training.length": "6steps"})
    assert load_diffusion(folder)[1]["prediction"] == "eps"
    assert losses(folder, "diffusion")[0] == pytest.approx(1, abs=0.15)  # an eps of zeros misses noise of variance 1
    state = torch.load(folder / "diffusion_state.pt", weights_only=True)
    assert state["scheduler"]["T_0"] == 10_000 and "weight_decay" in state["optimizer"]["param_groups"][0]
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0


@pytest.mark.slow
def test_the_identity_loss_reaches_the_network(output, faces, tmp_path, monkeypatch):
    def first_loss(name: str, weight: float) -> float:
        settings = {"extras.identity": weight, "training.name": name, "training.length": "2steps"}
        return losses(run("diffusion", monkeypatch, faces, own_copy(output, tmp_path / name), **settings), "diffusion")[0]

    plain, half, whole = first_loss("none", 0), first_loss("half", 0.5), first_loss("whole", 1)
    assert whole - plain == pytest.approx(2 * (half - plain), rel=1e-3) and 0 < whole - plain <= 2


@pytest.mark.slow
def test_the_record_keeps_the_latest_identity_weight(output, faces, tmp_path, monkeypatch):
    copy = own_copy(output, tmp_path / "o")
    run("diffusion", monkeypatch, faces, copy, **{"training.length": "2steps"})
    folder = run("diffusion", monkeypatch, faces, copy, **{"training.length": "3steps", "extras.identity": 0.25})
    record = json.loads((folder / "diffusion.json").read_text())
    assert record["may_change"] == {"training.length": "3steps", "extras.identity": 0.25}
    monkeypatch.setitem(extras.EXTRAS["noise"], "latents", 0.5)
    with pytest.raises(UserError, match="was made with extras.use = .*set training.name to another name"):
        run("diffusion", monkeypatch, faces, copy, **{"training.length": "4steps"})
