"""The embedded miniature: contexts drawn like real ones, faces of the right size, identities that a negative sets apart."""
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN

from config.config import Config
from experiments import demo
from models.published import load_backbone, load_diffusion, load_first_stage
from utils.diffusion.guidance import guided, unguided
from utils.diffusion.latent_diffusion import LatentDiffusion, to_uint8
from utils.diffusion.noise import gaussian
from utils.evaluation import scores
from utils.identities import contexts, negatives
from utils.runtime.files import read_npz
from utils.training.faces import MARGIN, of_canvas

DEMO = Path(__file__).parents[2] / "models" / "demo"
IDENTITIES, IMAGES, SAMPLING = 8, 4, Config().sampling
LABELS = np.repeat(np.arange(IDENTITIES), IMAGES)


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    """Images [32, 3, 64, 64] in [-1, 1] of eight drawn identities, w = 0 and Far-Neg at 0.5, from the same noise."""
    unet, settings = load_diffusion(DEMO)
    first_stage = load_first_stage(DEMO / "first_stage_encoder.safetensors", DEMO / "first_stage_decoder.safetensors")
    model = LatentDiffusion(unet, first_stage, settings["betas"], settings["latent_shape"], settings["prediction"],
                            torch.device("cpu"), bf16=False)
    c = contexts.gaussian(IDENTITIES, **read_npz(DEMO / "context_statistics.npz", ("mean", "covariance")), seed=0)
    far, _, _ = negatives.select(c, "far")
    numbers = np.tile(np.arange(IMAGES), IDENTITIES).tolist()
    noise = partial(gaussian, 42, LABELS.tolist(), numbers, shape=model.latent_shape)
    of_identities = torch.from_numpy(c[LABELS]), torch.from_numpy(far[LABELS])
    return {name: model.images(*of_identities, noise, guide, SAMPLING.solver, SAMPLING.steps)
            for name, guide in (("w0", unguided), ("far", guided("negative", 0.5)))}


@pytest.mark.slow
def test_a_negative_context_sets_identities_apart(drawn):
    recogniser = load_backbone(Config().scores.recogniser)
    with torch.no_grad():
        fdr = {name: scores.metrics(scores.score_distributions(
            recogniser(of_canvas(images, MARGIN)).numpy(), LABELS,
            torch.device("cpu")))["fdr"] for name, images in drawn.items()}
    assert fdr["w0"] > 1 and fdr["far"] > 1.5 * fdr["w0"]


@pytest.mark.slow
def test_faces_are_found(drawn):
    images = torch.nn.functional.interpolate(drawn["far"], scale_factor=2, mode="bilinear")
    boxes, probabilities = MTCNN(min_face_size=30).detect(to_uint8(images).numpy())
    assert sum(box is not None for box in boxes) >= 31


@pytest.mark.slow
def test_make_demo_runs_every_stage(tmp_path, monkeypatch, capsys):
    small = ("sampling.identities=8", "sampling.images_per_identity=3", "sampling.steps=6", "fr.backbone=mobilefacenet",
             "fr.images_per_identity=3", "fr.batch_size=8", "fr.epochs=1",
             "sampling.precision=fp32")  # the same faces on every kind of processor
    monkeypatch.setattr("sys.argv", ["demo", f"paths.output={tmp_path}", "device=cpu", *small])
    demo.main()
    assert "[stage 21 of 21, about" in capsys.readouterr().out
    rows = (tmp_path / "demo/scores/recogniser/table.md").read_text().splitlines()[2:]
    fdr = {row.split(" | ")[0].strip("| "): float(row.split(" | ")[6]) for row in rows}
    assert min(fdr[strategy] for strategy in ("null", "close", "rand", "mid", "far")) > fdr["w0"] > 0.5
    assert (tmp_path / "demo/far/fr/cosface-mobilefacenet/backbone.safetensors").is_file()
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    runs = [run for run in fdr if not run.startswith("paper")]
    assert len(runs) == 6 and all(f'alt="identity 000007, image 2, {run}"' in page for run in runs)
    assert f"{fdr['far']:.2f}" in page


def test_minutes_left_follow_what_this_machine_took():
    scripts = ["negatives", "sample", "sample", "align", "train_fr"]
    seconds = demo.SECONDS
    assert demo.seconds_left(scripts, []) == 1 + 2 * seconds["sample"] + seconds["align"] + seconds["train_fr"]
    assert demo.seconds_left(scripts, [("negatives", 9.0)]) == 2 * seconds["sample"] + seconds["align"] + seconds["train_fr"]
    slow = [("negatives", 9.0), ("sample", 3.0 * seconds["sample"])]  # a machine three times slower
    assert demo.seconds_left(scripts, slow) == 3 * (seconds["sample"] + seconds["align"] + seconds["train_fr"])
    done = [*slow, ("sample", 0.5)]  # one that was there already makes nothing shorter
    assert demo.seconds_left(scripts, done) == 3 * (seconds["align"] + seconds["train_fr"])


def test_the_files_are_small_and_have_a_card():
    assert sum(file.stat().st_size for file in DEMO.rglob("*")) < 40e6
    card = (DEMO / "CARD.md").read_text(encoding="utf-8")
    for file in DEMO.iterdir():
        if file.suffix in (".safetensors", ".npz"):
            assert file.name in card
