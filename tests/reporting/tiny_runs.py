"""Runs as the stages leave them, of a few small pictures: what a page is made of, in a second."""
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from config import places
from config.config import Config
from config.load import resolve
from utils.evaluation import scores
from utils.faces.aligned import write_kept, write_list
from utils.runtime.files import write_bytes, write_csv, write_json, write_npz

HOSTILE = ("<img src=x onerror=alert(1)>", "\"'><script>alert(2)<", "{{ 7 * 7 }}", "Zoë & 李")
PEOPLE = ("000000", *HOSTILE, *(f"{i:06d}" for i in range(5, 12)))
IMAGES = 6
REASON = "no face <b id=reason>"


def write_run(output: Path, name: str, spread: float, arguments: dict[str, str], seed: int = 0) -> Path:
    """A run that was sampled, aligned (two failures) and scored; its identities lie `spread` apart."""
    config, run = resolve({"preset": "demo"}, {"paths.output": str(output), "paths.run": name, **arguments}), output / name
    random = np.random.default_rng(seed)
    colours = np.random.default_rng(5).integers(0, 256, (len(PEOPLE), 4, 4, 3))
    kept = {person: [run / "aligned" / person / f"{k}.png" for k in range(IMAGES)] for person in PEOPLE}
    for person, own in zip(PEOPLE, colours, strict=True):
        for k in range(IMAGES):
            picture = np.clip(own + random.integers(-40, 40, own.shape), 0, 255).astype(np.uint8)
            file = places.samples(run) / person / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC).save(file)
    record = {"format": 2, "versions": {"python": "3.11", "torch": "<i>2"}, "config": asdict(config)}
    write_json(places.run_record(run), record | {"decides": {"weights": ["ab" * 32], "contexts": "cd" * 32}})
    write_bytes(places.contact_sheet(run), b"")
    write_kept(run / "aligned", kept)
    failed = {(PEOPLE[0], "1.png"): REASON, ("../../elsewhere", "secret.png"): "unreadable"}
    write_list(run / "aligned", "failures", failed)
    write_list(run / "aligned", "sources", {(person, f"{k}.png"): "0" for person in PEOPLE for k in range(IMAGES)} | failed)
    write_json(places.alignment_record(run / "aligned"), record | {"decides": {"align.template": "arcface", "align.images": ""}})

    embeddings = spread * np.repeat(np.random.default_rng(3).normal(size=(len(PEOPLE), 16)), IMAGES, axis=0)
    embeddings += random.normal(size=embeddings.shape)
    labels, folder = np.repeat(PEOPLE, IMAGES), places.scores(run, config)
    distributions = scores.score_distributions(embeddings, labels)
    write_npz(folder / "bootstrap.npz", identities=np.unique(labels), fdr=np.full(20, spread))
    write_npz(folder / "histograms.npz", **vars(distributions))
    write_json(folder / "metrics.json", scores.metrics(distributions) | {
        "intervals": {"fdr": [1.0, 2.0]}, "identities": len(PEOPLE), "images": len(labels), "variety": {"vendi": 7.25},
        "coverage": 0.625, "real_coverage": 0.9375, "real_faces": 500,
        "most_similar_identities": scores.most_similar_identities(embeddings, labels)})
    write_json(folder / "scores.json", record | {"decides": {}})
    return run


def write_training(run: Path) -> None:
    """A recogniser trained on a run, and verified."""
    fr, config = run / "fr" / "cosface-iresnet50", replace(Config(), preset="demo")
    write_csv(fr / "log.csv", ("step", "loss", "learning_rate", "epoch", "held_out_accuracy"),
              [(10 * epoch, 30 / epoch, 0.1, epoch, 1 - 0.5 / epoch) for epoch in range(1, 8)])
    write_json(fr / "run.json", {"decides": {}, "config": asdict(config), "versions": {}})
    write_json(fr / "verification.json", {"per_cent": {"LFW": 87.654}, "config": asdict(config)})


def write_runs(output: Path) -> list[str]:
    """Three runs and their names: w0, close and far, which was trained on too."""
    write_run(output, "set/w0", 0.7, {"guidance.w": "0"}, seed=1)
    write_run(output, "set/close", 1.0, {"negatives.strategy": "close"}, seed=2)
    write_training(write_run(output, "set/far", 1.5, {}, seed=3))
    return ["set/far", "set/close", "set/w0"]
