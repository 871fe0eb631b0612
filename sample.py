"""Stage 3: draw the identities' images from the diffusion model, each pushed away from its negative context.

Reads   <output>/contexts/<name>.npz and <name>.negatives-<kind>.npz (stages 1 and 2), the weights of config `model`
Writes  <run>/samples/<identity>/<k>.png and a dataset card, README.md; <run>/contact_sheet.png, <run>/run.json

    python sample.py
    python sample.py --preset paper_casia guidance.w=0.5 sampling.solver=ddim sampling.steps=200
    torchrun --nproc_per_node=8 sample.py --preset paper_casia
    python sample.py --verify output/demo/far         # draws some of its images again and compares; checks every digest

Running the same command again continues: what is done stays as it is.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import places
from config.config import Config
from config.load import load_config
from models.state_dicts import MOST_BYTES as MOST_WEIGHTS
from utils.diffusion import fitted, guidance, solvers, spacings
from utils.diffusion.annealing import annealed
from utils.diffusion.latent_diffusion import load_model, to_uint8
from utils.diffusion.noise import ANNEALING, CONE, DIRECTION, W, gaussian, uniform
from utils.faces.dataset_card import write_cards
from utils.faces.image_writer import ImageWriter, is_complete_png, png_size, require_complete
from utils.identities import contexts as identity_contexts
from utils.identities import negatives as negative_contexts
from utils.identities.negatives import STRATEGIES
from utils.identities.perturbation import covariance_root, lowest_cosines, perturbed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet
from utils.runtime.files import array_digest, file_digest
from utils.runtime.progress import StageBar, announce
from utils.runtime.records import Record, noted
from utils.runtime.smaller_batches import SmallerBatches, read_smaller_batches

CHOICES = {"negatives.strategy": (*STRATEGIES, "custom"), "guidance.rule": guidance.RULES,
           "guidance.schedule": guidance.SCHEDULES, "sampling.solver": solvers.SOLVERS,
           "sampling.spacing": ("default", *spacings.SPACINGS), "variety.w": guidance.W_PER_IMAGE}
SHEET_ROWS, SHEET_COLUMNS = 16, 10


def main() -> None:
    if "--verify" in sys.argv:
        from experiments.witness import verify
        return verify(sys.argv[sys.argv.index("--verify") + 1 :])
    config = load_config(__doc__, reads=("paths", "contexts", "negatives", "model", "guidance", "variety", "sampling"),
                         choices=CHOICES)
    ranks, run, sampling = distributed.setup(config.device), places.run_folder(config), config.sampling
    sampler = Sampler(config, ranks.device)

    # the run's record: a folder begun with other settings is refused
    record = Record(places.run_record(run), sampler.decides, "paths.run", contents=places.samples(run), may_change={
        f"sampling.{name}": getattr(sampling, name) for name in ("identities", "images_per_identity")})
    ranks.on_main(lambda: refuse_others(run, sampler))
    ranks.on_main(lambda: record.begin(config=asdict(config) | contexts_as_made(config, sampler.decides["contexts"])))

    # what is left to draw: an image is always drawn among the same neighbours, so that it is the same to the last bit
    # whatever was done before and however many ranks there are
    batches = ranks.shard(list(enumerate(sampler.batches)))
    files = {image: sampler.file(run, image) for _, batch in batches for image in batch}
    left = {image for image in tqdm(files, "check what is done", disable=not ranks.is_main, leave=False)
            if not is_complete_png(files[image])}
    ranks.print(f"{run}: {len(files) - len(left)} of this process's {len(files)} images are done")

    announce("sample", len(left), "images", places.samples(run), png_size(sampler.image_size), ranks=ranks)
    memory = SmallerBatches(run, ranks.rank, sampling.batch_size)
    with torch.inference_mode(), ImageWriter(waiting=sampling.batch_size) as writer, \
            StageBar(total=len(left), unit="image", disable=not ranks.is_main, desc="sample") as progress:
        for number, batch in ((number, batch) for number, batch in batches if not left.isdisjoint(batch)):
            for image, pixels in zip(batch, memory.make(number, partial(sampler.draw, batch)), strict=True):
                if image in left:
                    writer.write(files[image], pixels)
            progress.update(len(left.intersection(batch)))
    ranks.barrier()
    require_complete([files[image] for image in left], run, "drawn", "images")

    if ranks.is_main:
        rows = [[sampler.file(run, (i, k)) for k in range(min(SHEET_COLUMNS, sampling.images_per_identity))]
                for i in range(min(SHEET_ROWS, sampling.identities))]
        contact_sheet(rows, places.contact_sheet(run))
        write_cards(run)
        print(f"{sampling.identities} identities x {sampling.images_per_identity} images in {places.samples(run)}; "
              f"look at {places.contact_sheet(run)}")
        if smaller := read_smaller_batches(run):
            print(f"{len(smaller)} of {len(sampler.batches)} batches were drawn in parts of {min(smaller.values())} images "
                  f"or more for lack of memory: {run / 'smaller_batches-*.json'}")
    ranks.close()


def refuse_others(run: Path, sampler: "Sampler") -> None:
    """Raises UserError where there are images that the config does not ask for: later stages would take them too."""
    asked = {sampler.file(run, image) for batch in sampler.batches for image in batch}
    if others := sorted(set(places.samples(run).glob("*/*.png")) - asked):
        raise UserError(f"{run}: holds images beyond the sampling.identities and sampling.images_per_identity asked for "
                        f"({others[0].relative_to(run)}); raise these to what they were, or set paths.run to another name")


def contexts_as_made(config: Config, digest: str) -> dict[str, Any]:
    """The settings `contexts` that the contexts of that digest were made with: later stages may know them by name alone."""
    record = places.contexts_file(config).with_suffix(".json")
    made = noted(record, "config") if noted(record, "digest") == digest else None
    return {"contexts": made["contexts"]} if isinstance(made, dict) and isinstance(made.get("contexts"), dict) else {}


class Sampler:
    """Contexts, negatives and the model of a config, and what they draw.

    Attributes:
        image_size: width of the images, in pixels.
        decides: what decides the images, for the run's record.
        batches: of (identity, sample), every one that the config asks for.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.sampling, self.device, self.config = config.sampling, device, config
        file = places.contexts_file(config)
        self.ids, self.contexts = identity_contexts.read(file)
        if self.sampling.identities > len(self.ids):
            raise UserError(f"sampling.identities: {self.sampling.identities} is more than the {len(self.ids)} contexts of "
                            f"{file}; lower it to {len(self.ids)}")
        digest, self.negatives = identity_contexts.digest(self.ids, self.contexts), None
        if config.guidance.w > 0:
            self.negatives = negative_contexts.read(places.negatives_file(config), self.ids, self.contexts.shape[1], digest)
        self.model, weights = load_model(config.model, config.sampling, device)
        identity_contexts.check_contexts(file, self.ids, self.contexts, dimension=self.model.unet.context_emb.in_features)
        self.image_size = self.model.latent_shape[-1] * self.model.autoencoder.factor
        if config.variety.cone < 1:
            self.lowest = lowest_cosines(self.contexts, config.variety.cone, safe=config.variety.cone_bound == "safe")
            self.root = covariance_root(self.contexts) if config.variety.cone_noise == "contexts" else None
        self.timesteps = spacings.timesteps(self.sampling.spacing, self.sampling.solver, self.sampling.steps, self.model.betas)
        self.decides = {f"guidance.{name}": value for name, value in asdict(config.guidance).items()} | {
            f"sampling.{name}": getattr(self.sampling, name) for name in ("solver", "steps", "as_published", "batch_size", "seed")
        } | {"sampling.precision": "bf16" if self.model.dtype is torch.bfloat16 else "fp32", "device": device.type,
             "contexts": digest, "negatives": None if self.negatives is None else array_digest(self.negatives),
             "weights": [file_digest(file, MOST_WEIGHTS) for file in weights]}
        if self.sampling.spacing != "default":  # which runs of earlier versions do not name
            self.decides |= {"sampling.spacing": self.sampling.spacing, "timesteps": self.timesteps}
        if self.sampling.solver == "fitted":
            self.decides["fitted"] = array_digest(np.concatenate(fitted.FITTED[self.sampling.steps]))
        self.decides |= deciding_variety(config)
        images = [(i, k) for i in range(self.sampling.identities) for k in range(self.sampling.images_per_identity)]
        self.batches = [images[start : start + self.sampling.batch_size]
                        for start in range(0, len(images), self.sampling.batch_size)]

    def file(self, run: Path, image: tuple[int, int]) -> Path:
        return places.samples(run) / self.ids[image[0]] / f"{image[1]}.png"

    def draw(self, batch: list[tuple[int, int]], size: int) -> np.ndarray:
        """The images of a batch, uint8 [B, H, W, 3], `size` of them at a time.

        Parts are padded to that size, so that all have the same shape; an image's bytes are a function of it and its place.
        """
        return np.concatenate([self._draw_part(batch[start : start + size], size) for start in range(0, len(batch), size)])

    def _draw_part(self, part: list[tuple[int, int]], size: int) -> np.ndarray:
        identities, numbers = map(list, zip(*part, *[part[-1]] * (size - len(part)), strict=True))
        images = [torch.tensor(which, device=self.device) for which in (identities, numbers)]  # not copied at every step
        noise = partial(gaussian, self.sampling.seed, *images, shape=self.model.latent_shape, device=self.device)
        negatives = None if self.negatives is None else torch.from_numpy(self.negatives[identities])
        contexts = torch.from_numpy(self.contexts_of(identities, numbers))
        guide = guidance.guided(**asdict(self.config.guidance) | {"w": self.w_of(identities, numbers)},
                                change=self.annealing(images))
        drawn = self.model.images(contexts, negatives, noise, guide, self.sampling.solver, self.timesteps,
                                  self.sampling.as_published)
        if not drawn.isfinite().all():
            raise UserError(f"{self.config.model.diffusion}: images of '{self.ids[identities[0]]}' are not finite; set "
                            "sampling.precision=fp32, lower guidance.w, or take other weights")
        return to_uint8(drawn).cpu().numpy()[: len(part)]

    # what is each image's own beside its noise: a function of (seed, identity, k) alone

    def contexts_of(self, identities: list[int], numbers: list[int]) -> np.ndarray:
        """The contexts of images, [B, D] float32: their identities', or perturbed ones."""
        contexts, seed = self.contexts[identities], self.sampling.seed
        if self.config.variety.cone == 1:
            return contexts
        return perturbed(contexts, self.lowest[identities], uniform(seed, identities, numbers, CONE, ()).numpy(),
                         gaussian(seed, identities, numbers, DIRECTION, contexts.shape[1:]).numpy(), self.root)

    def w_of(self, identities: list[int], numbers: list[int]) -> float | torch.Tensor:
        """The w of images: one for all, or [B, 1, 1, 1]."""
        u = uniform(self.sampling.seed, identities, numbers, W, (1, 1, 1))
        w = guidance.W_PER_IMAGE[self.config.variety.w](self.config.guidance.w, u)
        if not isinstance(w, torch.Tensor):
            return w
        return w.float().to(self.device) if self.config.guidance.w > 0 else 0.0  # whatever the others of a batch drew

    def annealing(self, images: list[torch.Tensor]) -> Callable | None:
        """What is done to contexts along t; None: nothing."""
        if not self.config.variety.annealing:
            return None

        def noise(t: int) -> torch.Tensor:
            return gaussian(self.sampling.seed, *images, ANNEALING + t, self.contexts.shape[1:], self.device)

        return partial(annealed, noise=noise, T=self.model.T, scale=self.config.variety.annealing)


def deciding_variety(config: Config) -> dict[str, Any]:
    """What of the settings `variety` decides the images; nothing where it is off, as in runs of earlier versions."""
    variety = config.variety
    on = ["cone", "cone_noise", "cone_bound"] if variety.cone < 1 else []
    on += ["w"] if variety.w != "constant" and config.guidance.w else []
    on += ["annealing"] if variety.annealing else []
    return {f"variety.{name}": getattr(variety, name) for name in on}


if __name__ == "__main__":
    run_script(main)
