"""Stage 3: draw the identities' images from the diffusion model, each pushed away from its negative context.

Reads   <output>/contexts/<name>.npz and <name>.negatives-<strategy>.npz (stages 1 and 2), the weights of config `model`
Writes  <run>/samples/<identity>/<k>.png, <run>/contact_sheet.png, <run>/run.json

    python sample.py
    python sample.py --preset paper_casia guidance.w=0.5 sampling.solver=ddim sampling.steps=200
    torchrun --nproc_per_node=8 sample.py --preset paper_casia

Running the same command again continues: what is done stays as it is.
"""
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from config import places
from config.load import load_config
from models import published
from utils.diffusion import guidance, solvers
from utils.diffusion.latent_diffusion import LatentDiffusion, to_uint8
from utils.diffusion.noise import gaussian
from utils.faces.image_writer import ImageWriter, is_complete_png
from utils.identities import contexts as identity_contexts
from utils.identities import negatives as negative_contexts
from utils.identities.negatives import STRATEGIES
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet
from utils.runtime.files import array_digest, file_digest
from utils.runtime.records import Record

CHOICES = {"negatives.strategy": (*STRATEGIES, "custom"), "guidance.rule": guidance.RULES,
           "guidance.schedule": guidance.SCHEDULES, "sampling.solver": solvers.SOLVERS}
SHEET_ROWS, SHEET_COLUMNS = 16, 10


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "negatives", "model", "guidance", "sampling"), choices=CHOICES)
    if config.sampling.as_published:
        solvers.check_published(config.sampling.solver, config.sampling.steps)
    ranks, run, sampling = distributed.setup(config.device), places.run_folder(config), config.sampling

    # the identities, and the context that each is pushed away from
    contexts_file = places.contexts_file(config)
    ids, contexts = identity_contexts.read(contexts_file)
    if sampling.identities > len(ids):
        raise UserError(f"sampling.identities: {sampling.identities} is more than the {len(ids)} contexts of "
                        f"{contexts_file}; lower it to {len(ids)}")
    contexts_digest, negatives = identity_contexts.digest(ids, contexts), None
    if config.guidance.w > 0:
        negatives = negative_contexts.read(places.negatives_file(config), ids, contexts.shape[1], contexts_digest)

    # the model
    model, weights = load_model(config.model, sampling, ranks.device)
    identity_contexts.check_contexts(contexts_file, ids, contexts, dimension=model.unet.context_emb.in_features)
    guide = guidance.guided(**asdict(config.guidance))

    # the run's record: a folder begun with other settings is refused
    decides = {f"guidance.{name}": value for name, value in asdict(config.guidance).items()} | {
        f"sampling.{name}": getattr(sampling, name) for name in ("solver", "steps", "as_published", "batch_size", "seed")} | {
        "sampling.precision": "bf16" if model.dtype is torch.bfloat16 else "fp32", "device": ranks.device.type,
        "contexts": contexts_digest, "negatives": None if negatives is None else array_digest(negatives),
        "weights": [file_digest(file) for file in weights]}
    record = Record(places.run_record(run), decides, "paths.run", may_change={
        f"sampling.{name}": getattr(sampling, name) for name in ("identities", "images_per_identity")})
    ranks.on_main(lambda: record.begin(config=asdict(config)))

    # what is left to draw
    samples = places.samples(run)
    images = [(i, k) for i in ranks.shard(range(sampling.identities)) for k in range(sampling.images_per_identity)]
    files = {(i, k): samples / ids[i] / f"{k}.png" for i, k in images}
    left = [image for image in tqdm(images, "check what is done", disable=not ranks.is_main, leave=False)
            if not is_complete_png(files[image])]
    ranks.print(f"{run}: {len(images) - len(left)} of this process's {len(images)} images are done")

    # identities mix freely in a batch; the last one is padded, so that every batch has the same shape
    progress = tqdm(total=len(left), unit="image", disable=not ranks.is_main, desc="sample")
    with torch.inference_mode(), ImageWriter() as writer, progress:
        for start in range(0, len(left), sampling.batch_size):
            batch = left[start : start + sampling.batch_size]
            identities, numbers = map(list, zip(*batch, *[batch[-1]] * (sampling.batch_size - len(batch)), strict=True))
            noise = partial(gaussian, sampling.seed, identities, numbers, shape=model.latent_shape, device=ranks.device)
            drawn = model.images(torch.from_numpy(contexts[identities]),
                                 None if negatives is None else torch.from_numpy(negatives[identities]), noise, guide,
                                 sampling.solver, sampling.steps, sampling.as_published)
            for image, pixels in zip(batch, to_uint8(drawn).cpu().numpy(), strict=False):
                writer.write(files[image], pixels)
            progress.update(len(batch))
    ranks.barrier()

    if ranks.is_main:
        rows = [[samples / ids[i] / f"{k}.png" for k in range(min(SHEET_COLUMNS, sampling.images_per_identity))]
                for i in range(min(SHEET_ROWS, sampling.identities))]
        contact_sheet(rows, places.contact_sheet(run))
        print(f"{sampling.identities} identities x {sampling.images_per_identity} images in {samples}; "
              f"look at {places.contact_sheet(run)}")
    ranks.close()


def load_model(model, sampling, device: torch.device) -> tuple[LatentDiffusion, list[Path]]:
    """The generator of the settings `model`, and the files of its weights. Raises UserError where they do not fit."""
    step = model.step or None
    unet, settings = published.load_diffusion(model.diffusion, step)
    autoencoder = published.load_first_stage(model.first_stage_encoder, model.first_stage_decoder)
    if settings["latent_shape"][-1] * autoencoder.factor != settings["image_size"]:
        raise UserError(f"{model.first_stage_decoder}: enlarges latents {autoencoder.factor} times, but "
                        f"{model.diffusion} was trained with another first stage; take both from one model")
    if sampling.steps > settings["T"]:
        raise UserError(f"sampling.steps: {sampling.steps} is more than the model's T; the most is {settings['T']}")
    files = [published.checkpoint_file(Path(model.diffusion) / "checkpoints", step, ema=True), model.first_stage_encoder,
             model.first_stage_decoder]
    bf16 = distributed.use_bf16(sampling.precision, device)
    return LatentDiffusion(unet, autoencoder, settings["betas"], settings["latent_shape"], settings["prediction"], device,
                           bf16), files


if __name__ == "__main__":
    run_script(main)
