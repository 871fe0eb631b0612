"""Stage 3: draw the identities' images from the diffusion model, each pushed away from its negative context.

Reads   <output>/contexts/<name>.npz and <name>.negatives-<strategy>.npz (stages 1 and 2), the weights of config `model`
Writes  <run>/samples/<identity>/<k>.png, <run>/contact_sheet.png, <run>/run.json

    python sample.py
    python sample.py --preset paper_casia guidance.w=0.5 sampling.solver=ddim sampling.steps=200
    torchrun --nproc_per_node=8 sample.py --preset paper_casia

Running the same command again continues: what is done stays as it is.
"""
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from config.load import load_config
from models import published
from utils.diffusion import guidance
from utils.diffusion.latent_diffusion import draw, to_uint8
from utils.diffusion.noise import gaussian
from utils.faces.image_writer import ImageWriter, is_complete_png
from utils.identities import contexts as contexts_files
from utils.identities import negatives
from utils.runtime import files as runs
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet

SHEET_ROWS, SHEET_COLUMNS = 16, 10


def main() -> None:
    config = load_config(__doc__)
    ranks = distributed.setup(config.device)
    run, samples = runs.run_folder(config), runs.samples_folder(config)
    w, sampling = config.guidance.w, config.sampling

    # the identities and whom each is pushed away from
    contexts_file = runs.require_file(runs.contexts_file(config), "contexts", "run create_sample_identity_contexts.py")
    ids, contexts = contexts_files.read(contexts_file)
    if sampling.identities > len(ids):
        raise UserError(f"sampling.identities: {sampling.identities} is more than the {len(ids)} contexts of "
                        f"{contexts_file}; lower it to {len(ids)}")
    contexts_digest = contexts_files.digest(ids, contexts)
    negative_index = None
    if w > 0:
        negatives_file = runs.require_file(runs.negatives_file(config), "negatives", "run create_negative_contexts.py")
        chosen_by = negatives.chosen_by(config.negatives.strategy, config.negatives.pool, config.negatives.seed)
        negative_index, _ = negatives.read(negatives_file, contexts_digest, ids, chosen_by)
    contexts = torch.from_numpy(contexts)

    # the model
    model = config.model
    unet, settings = published.load_diffusion(model.diffusion, model.step or None, model.ema)
    autoencoder = published.load_first_stage(model.first_stage_encoder, model.first_stage_decoder)
    weights_files = [published.checkpoint_file(Path(model.diffusion) / "checkpoints", model.step or None, model.ema),
                     model.first_stage_encoder, model.first_stage_decoder]
    T, betas, latent_shape = settings["T"], settings["betas"], settings["latent_shape"]
    if latent_shape[-1] * autoencoder.factor != settings["image_size"]:
        raise UserError(f"{model.first_stage_decoder}: enlarges latents {autoencoder.factor} times, but "
                        f"{model.diffusion} was trained with another first stage; take both from one model")
    if sampling.steps > T:
        raise UserError(f"sampling.steps: {sampling.steps} is more than the model's T; the most is {T}")
    contexts_files.check_contexts(contexts_file, ids, contexts.numpy(), dimension=unet.context_emb.in_features)
    use_bf16 = distributed.use_bf16(sampling.precision, ranks.device)
    unet = unet.to(ranks.device, torch.bfloat16 if use_bf16 else torch.float32, memory_format=torch.channels_last)
    autoencoder = autoencoder.to(ranks.device, memory_format=torch.channels_last)
    w_of_t = guidance.schedule(config.guidance.schedule, w, T, config.guidance.interval)

    # the run's record: a folder begun with other settings is refused
    images = [(i, k) for i in ranks.shard(range(sampling.identities)) for k in range(sampling.images_per_identity)]
    files = {(i, k): samples / ids[i] / f"{k}.png" for i, k in images}
    todo = [image for image in tqdm(images, "look at what is done", disable=not ranks.is_main, leave=False)
            if not is_complete_png(files[image])]
    ranks.print(f"{run}: {len(images) - len(todo)} of this process's {len(images)} images are done")
    if ranks.is_main:
        decides = asdict(config.guidance) | asdict(sampling) | {
            "contexts": contexts_digest,
            "negatives": None if negative_index is None else runs.array_digest(negative_index),
            "weights": [runs.file_digest(file) for file in weights_files],
            "device": ranks.device.type, "precision": "bf16" if use_bf16 else "fp32"}
        for extendable in ("identities", "images_per_identity"):
            decides.pop(extendable)
        runs.claim_run(run / "run.json", decides, {"config": asdict(config)})
    ranks.barrier()

    def images_of(batch: list[tuple[int, int]]) -> torch.Tensor:
        """The images of a batch of (identity, sample), uint8 [B, H, W, 3]."""
        identities, numbers = [i for i, _ in batch], [k for _, k in batch]
        c_pos, c_neg = contexts[identities].to(ranks.device), None
        if w > 0:
            index = torch.from_numpy(negative_index[identities])
            c_neg = torch.where(index[:, None] >= 0, contexts[index.clamp(min=0)], 0.0).to(ranks.device)
        x_0 = draw(unet, c_pos, c_neg, w_of_t,
                   lambda t: gaussian(sampling.seed, identities, numbers, t, latent_shape, ranks.device),
                   sampling.solver, sampling.steps, betas, sampling.as_published, settings["prediction"])
        # the first stage's codebook would lose digits as bfloat16 weights; under autocast it keeps them
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=use_bf16):
            return to_uint8(autoencoder.decode(x_0))

    # sample: identities mix freely in a batch; the last one is padded, so that every batch has the same shape
    progress = tqdm(total=len(todo), unit="image", disable=not ranks.is_main, desc="sample")
    with torch.inference_mode(), ImageWriter() as writer, progress:
        for start in range(0, len(todo), sampling.batch_size):
            batch = todo[start : start + sampling.batch_size]
            padded = [*batch, *[batch[-1]] * (sampling.batch_size - len(batch))]
            for image, pixels in zip(batch, images_of(padded).cpu().numpy(), strict=False):
                writer.write(files[image], pixels)
            progress.update(len(batch))
    ranks.barrier()

    if ranks.is_main:
        rows = [[samples / ids[i] / f"{k}.png" for k in range(min(SHEET_COLUMNS, sampling.images_per_identity))]
                for i in range(min(SHEET_ROWS, sampling.identities))]
        contact_sheet(rows, run / "contact_sheet.png")
        print(f"{sampling.identities} identities x {sampling.images_per_identity} images in {samples}; "
              f"look at {run / 'contact_sheet.png'}")
    ranks.close()


if __name__ == "__main__":
    run_script(main)
