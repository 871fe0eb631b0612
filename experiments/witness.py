"""Is a run what its records say? `python sample.py --verify <run folder> [batches]`

Draws some batches of its images again and compares them: to the last bit where the kind of device is the same, else to
within some grey levels. Checks the digests of weights, contexts and negatives, and that aligned faces and scores were made from
what is there now.
"""
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import places
from config.load import from_record
from sample import Sampler
from utils.faces.aligned import read_kept, read_list
from utils.faces.folders import contents, listing, select
from utils.faces.images import read_image
from utils.runtime import ranks
from utils.runtime.errors import UserError
from utils.runtime.files import read_json
from utils.runtime.records import decided
from utils.runtime.smaller_batches import read_smaller_batches

BATCHES = 2
CLOSE = 2.0  # grey levels, on average: what another kind of device may differ by


def verify(arguments: Sequence[str]) -> None:
    """Raises UserError naming the first thing that is not as recorded."""
    if not 1 <= len(arguments) <= 2 or not arguments[-1:] or (len(arguments) == 2 and not arguments[1].isdecimal()):
        raise UserError("--verify: write python sample.py --verify <run folder> [batches to draw again]")
    run, number = Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else BATCHES
    recorded = decided(places.run_record(run), ("contexts", "weights"), "give the folder of a run of sample.py")
    config = from_record(config_of(places.run_record(run), "give the folder of a run of sample.py"))
    device = ranks.setup(config.device).device
    sampler = Sampler(config, device)
    for name in recorded.keys() - {"device", "sampling.precision"}:
        now = sampler.decides[name] if not isinstance(sampler.decides[name], tuple) else list(sampler.decides[name])
        if now != recorded[name]:
            raise UserError(f"{run}: was made with other {name} than there are now; put back what it was made from")

    # images, drawn again
    exact = recorded["device"] == device.type and recorded["sampling.precision"] == sampler.decides["sampling.precision"]
    smaller = read_smaller_batches(run)  # drawn in parts, for lack of memory
    batches = dict(random.SystemRandom().sample(list(enumerate(sampler.batches)), min(number, len(sampler.batches))))
    with torch.inference_mode():
        for place, batch in batches.items():
            size = smaller.get(place, config.sampling.batch_size)
            for image, pixels in zip(batch, sampler.draw(batch, size), strict=True):
                file = sampler.file(run, image)
                there = read_image(file).astype(int)
                difference = np.abs(there - pixels).mean() if there.shape == pixels.shape else np.inf
                if difference > (0 if exact else CLOSE):
                    raise UserError(f"{file}: is not the image that its run draws (they differ by {difference:.3f} grey levels "
                                    "on average); remove it, and run sample.py again")
    print(f"{sum(map(len, batches.values()))} images drawn again: {'the same bytes' if exact else 'the same to the eye'}")
    check_faces(run)


def config_of(record: Path, fix: str) -> dict[str, Any]:
    """The settings that a record keeps. Raises UserError where it keeps none."""
    config = read_json(record).get("config")
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in ("sampling", "scores")):
        raise UserError(f"{record}: does not say what the settings were; {fix}")
    return config


def check_faces(run: Path) -> None:
    """Whether the aligned faces and the scores, where there are some, were made from what is there now."""
    aligned = places.aligned(run)
    if not (aligned / "sources.csv").is_file():
        return print("no faces are aligned yet")
    sources = read_list(aligned / "sources.csv", "sources")
    images = [places.samples(run) / identity / name for identity, name in sources]
    for image, digest, now in zip(images, sources.values(), contents(images), strict=True):
        if digest != now:
            raise UserError(f"{image}: is not the image that was aligned; run align.py again")
    print(f"{len(images)} images are those that were aligned")
    for record in sorted((run / "scores").glob("*/scores.json")):
        fix = "delete it, and run plot_distributions.py again"
        faces, settings = decided(record, ("faces",), fix)["faces"], config_of(record, fix)["scores"]
        kept = select(read_kept(aligned), settings["identities"], settings["images_per_identity"])
        if faces != listing(kept):
            raise UserError(f"{record.parent}: is of other faces than are there now; run plot_distributions.py again")
        print(f"{record.parent}: is of the faces that are there")
