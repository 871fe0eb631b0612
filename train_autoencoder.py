"""Stage 0a: train the VQ first stage (VQ-f4 of LDM, arXiv 2112.10752) on a folder of faces.

Reads   training.faces, training.recogniser (its features and embeddings are part of the loss)
Writes  <output>/training/<name>/: first_stage_encoder.safetensors, first_stage_decoder.safetensors (LDM's names),
        autoencoder.csv, autoencoder.png (faces that were not trained on, above their reconstructions), state to continue
        <output>/faces/<folder>/: the faces that were found and cut out, cached

    python train_autoencoder.py training.faces=data/my-photos training.name=mine
    torchrun --nproc_per_node=4 train_autoencoder.py

It first learns to pass images through continuous latents. These are then brought to mean 0 and variance 1 (the
published model has no latent scale factor), the encoder is frozen, the codebook is put where the latents are (k-means),
and the decoder goes on learning from quantised latents. Running the same command again continues.
"""
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional as F
from tqdm import tqdm

from config.load import load_config
from models.autoencoder import Autoencoder, to_published
from models.published import load_backbone
from utils.recognition.augmentation import normalise
from utils.recognition.recogniser_training import faces as training_faces
from utils.recognition.recogniser_training import read_lines, read_state
from utils.runtime import files as runs
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet
from utils.training.loop import (
    Budget,
    Draws,
    average_gradients,
    batch_rows,
    check_finite,
    check_judge,
    flat_then_cosine,
    held_out,
)

CONTINUOUS = 0.7  # of the training: then the encoder is frozen and latents are quantised
LATENT_NOISE = 0.1  # keeps neighbouring latents alike
LATENT_PENALTY = 0.01  # of their mean square: without it the encoder would outgrow the noise
KMEANS_LATENTS = 400_000
REPORT_SECONDS, SAVE_SECONDS = 60, 300
SHEET = 12  # faces on the sheet
LOG_COLUMNS = ("step", "minutes", "loss", "pixel_error", "cosine", "images_per_second")


def main() -> None:
    config = load_config(__doc__)
    ranks = distributed.setup(config.device)
    settings, training = config.autoencoder, config.training
    if settings.batch_size % (2 * ranks.world_size):
        raise UserError(f"autoencoder.batch_size: {settings.batch_size} does not give {ranks.world_size} ranks an even "
                        f"number of images each; set a multiple of {2 * ranks.world_size}")
    folder, cache = runs.training_folder(config), runs.face_cache(config)

    # the faces, those of the held-out identities set apart
    recogniser = load_backbone(training.recogniser)
    check_judge(recogniser, training.recogniser)
    leave_out = read_lines(training.leave_out, "training.leave_out", "give one name a line") if training.leave_out else ()
    faces, crops, _ = training_faces.prepare(
        training.faces, leave_out, training.crop == "whole", config.align.minimum_face / 128, training.image_size,
        training.margin, recogniser, Path(training.recogniser), cache, ranks)
    is_validation, _ = held_out(faces.labels, len(faces.identities), training.held_out_identities)
    rows, validation_rows = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)[:256]

    latents = len(rows) * (training.image_size // 2 ** (len(settings.channels) - 1)) ** 2
    if latents < settings.codes:
        raise UserError(f"autoencoder.codes: {settings.codes} is more than the {latents} latents of the {len(rows)} faces "
                        f"to train on; lower it to {latents // 8 or 2}, or give more faces")

    # autoencoder, the recogniser that judges it, optimiser
    torch.manual_seed(training.seed)
    autoencoder = Autoencoder(settings.channels, settings.layers, settings.code_channels, settings.code_channels,
                              settings.codes).to(ranks.device, memory_format=torch.channels_last)
    bf16 = distributed.use_bf16(training.precision, ranks.device)
    margin = None if training.crop == "whole" else training.margin
    recogniser = recogniser.to(ranks.device, memory_format=torch.channels_last).requires_grad_(False)
    weights = [weight for weight in autoencoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, betas=(0.9, 0.99))

    # the run's record, and the state to continue from
    if ranks.is_main:
        decides = asdict(settings) | {"faces": faces.digest, "crop": training.crop, "margin": training.margin,
                                      "image_size": training.image_size, "seed": training.seed,
                                      "held_out_identities": training.held_out_identities,
                                      "recogniser": runs.file_digest(training.recogniser)}
        for extendable in ("minutes", "steps"):
            decides.pop(extendable)
        runs.claim_run(folder / "autoencoder.json", decides, {"config": asdict(config)}, "training.name")
    ranks.barrier()
    budget, log, quantised = Budget(settings.minutes, settings.steps, ranks), [], False
    state_file = folder / "autoencoder_state.pt"
    if state_file.is_file():
        state = read_state(state_file, ranks.device)
        autoencoder.load_state_dict(state["autoencoder"])
        optimizer.load_state_dict(state["optimizer"])
        quantised, log = state["quantised"], state["log"]
        budget = Budget(settings.minutes, settings.steps, ranks, state["step"], state["seconds"])
        ranks.print(f"continues after step {budget.step}, {budget.seconds / 60:.1f} minutes")
    if quantised:
        freeze_encoder(autoencoder)

    def save() -> None:
        if ranks.is_main:
            runs.write_torch(state_file, {
                "autoencoder": autoencoder.state_dict(), "optimizer": optimizer.state_dict(), "quantised": quantised,
                "log": log, "step": budget.step, "seconds": budget.seconds})

    def batch_of(numbers: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(crops[numbers]).to(ranks.device).permute(0, 3, 1, 2)
        return normalise(images).contiguous(memory_format=torch.channels_last)

    def judge(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return recogniser.with_early_features(training_faces.of_canvas(images, margin), "arcface")

    def decoding_loss(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """How the decoded latents differ from the images: pixels, the recogniser's early features, its embeddings."""
        judged = len(images) // 2  # half of them, since judging takes longer than decoding
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            decoded = autoencoder.vq.decode(latents, force_not_quantize=True).sample
            with torch.no_grad():
                features, embeddings = judge(images[:judged])
            decoded_features, decoded_embeddings = judge(decoded[:judged])
        perceptual = sum(F.l1_loss(*pair) for pair in zip(decoded_features, features, strict=True))
        identity = (1 - F.cosine_similarity(decoded_embeddings, embeddings)).mean()
        return F.l1_loss(decoded.float(), images) + settings.perceptual * perceptual + settings.identity * identity

    encode, loss_of = autoencoder.encode, decoding_loss
    if training.compile:
        encode, loss_of = (distributed.compiled(function, ranks.device, "training.compile")
                           for function in (encode, loss_of))

    @torch.no_grad()
    def validate() -> tuple[float, float]:
        """The mean absolute difference of the pixels (of 2) and the mean cosine of the embeddings."""
        errors, cosines = [], []
        for start in range(0, len(validation_rows), settings.batch_size):
            images = batch_of(validation_rows[start : start + settings.batch_size])
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                decoded = reconstruct(autoencoder, images, quantised).clamp(-1, 1)
                errors.append((decoded - images).abs().mean(dim=(1, 2, 3)))
                cosines.append(F.cosine_similarity(judge(images)[1], judge(decoded)[1]))
        return torch.cat(errors).mean().item(), torch.cat(cosines).mean().item()

    # the loop
    saved = reported = time.monotonic()
    reported_step, total = budget.step, torch.zeros((), device=ranks.device)
    progress_bar = tqdm(total=100, unit="%", disable=not ranks.is_main, desc="train the autoencoder", bar_format=
                        "{desc}: {n:.1f}% |{bar}| {elapsed}<{remaining}{postfix}")
    first_step = budget.step
    is_over = not budget.go_on()
    while not is_over:
        begin_step = time.monotonic()
        if not quantised and budget.progress >= CONTINUOUS:
            quantise(autoencoder, crops, rows, batch_of, ranks, training.seed)
            quantised, first_step = True, budget.step
            save()
            budget.exclude(begin_step)
            begin_step = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * flat_then_cosine(budget.progress)
        draws = Draws(training.seed, budget.step, settings.batch_size, ranks)
        images = batch_of(rows[batch_rows(len(rows), settings.batch_size, training.seed, budget.step, ranks)])
        mirrored = draws.uniform() < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16), torch.set_grad_enabled(not quantised):
            latents = encode(images).float()
        if quantised:
            loss = loss_of(autoencoder.quantize(latents).requires_grad_(), images)
        else:
            loss = loss_of(latents + LATENT_NOISE * draws.normal(*latents.shape[1:]), images)
            loss = loss + LATENT_PENALTY * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(ranks, weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        budget.step += 1
        if budget.step == first_step + 1 and training.compile:
            budget.exclude(begin_step)  # the first step compiles
        total += loss.detach()
        is_over = not budget.go_on()
        progress_bar.update(100 * budget.progress - progress_bar.n)

        if is_over or ranks.agree(time.monotonic() - reported > REPORT_SECONDS):
            steps = budget.step - reported_step
            [mean] = [value / steps / ranks.world_size for value in ranks.sum([total.item()])]
            check_finite(mean, norm, state_file, budget.step, "autoencoder.learning_rate")
            rate = steps * settings.batch_size / (time.monotonic() - reported)
            log.append((budget.step, budget.seconds / 60, mean, *validate(), rate))
            progress_bar.set_postfix_str(" loss {2:.4f}, pixels {3:.4f}, cosine {4:.3f}, {5:.0f} images/s".format(*log[-1]))
            if ranks.is_main:
                runs.write_csv(folder / "autoencoder.csv", LOG_COLUMNS, log)
                write_sheet(autoencoder, batch_of(validation_rows[:SHEET]), quantised, folder / "autoencoder.png")
            reported, reported_step = time.monotonic(), budget.step
            total.zero_()
            if ranks.agree(time.monotonic() - saved > SAVE_SECONDS):
                save()
                saved = time.monotonic()
    progress_bar.close()
    if not quantised:  # a training of few steps
        quantise(autoencoder, crops, rows, batch_of, ranks, training.seed)
        quantised = True
    save()

    if ranks.is_main:
        encoder, decoder = to_published(autoencoder.cpu())
        runs.write_safetensors(folder / "first_stage_encoder.safetensors", encoder)
        runs.write_safetensors(folder / "first_stage_decoder.safetensors", decoder)
        print(f"{folder}: first_stage_encoder.safetensors, first_stage_decoder.safetensors; {budget.step} steps, "
              "pixel error {3:.4f}, cosine {4:.3f}".format(*log[-1]) + f"; look at {folder / 'autoencoder.png'}")
    ranks.close()


def reconstruct(autoencoder: Autoencoder, images: torch.Tensor, quantised: bool) -> torch.Tensor:
    latents = autoencoder.encode(images).float()
    return autoencoder.decode(latents) if quantised else autoencoder.vq.decode(latents, force_not_quantize=True).sample


@torch.no_grad()
def quantise(autoencoder: Autoencoder, crops: np.ndarray, rows: np.ndarray, batch_of, ranks: distributed.Ranks,
             seed: int) -> None:
    """Bring latents to mean 0 and variance 1, put the codebook where they are, and freeze the encoder."""
    chosen = np.random.default_rng(seed).permutation(rows)[:8192]
    latents = torch.cat([autoencoder.encode(batch_of(chosen[start : start + 64])).float().cpu()
                         for start in range(0, len(chosen), 64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    points = ((latents - mean[:, None, None]) / std[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2).numpy()
    points = np.random.default_rng(seed).permutation(points)[:KMEANS_LATENTS]
    vq = autoencoder.vq
    kmeans = MiniBatchKMeans(vq.quantize.n_e, batch_size=16_384, max_iter=10, n_init=1, init="random", random_state=seed,
                             reassignment_ratio=0.001)
    codes = torch.from_numpy(kmeans.fit(points).cluster_centers_)
    # quant_conv gives normalised latents, post_quant_conv takes them back
    mean, std, codes = (tensor.to(ranks.device) for tensor in (mean, std, codes))
    vq.quant_conv.weight /= std[:, None, None, None]
    vq.quant_conv.bias.copy_((vq.quant_conv.bias - mean) / std)
    vq.post_quant_conv.bias += vq.post_quant_conv.weight[:, :, 0, 0] @ mean
    vq.post_quant_conv.weight *= std[:, None, None]
    vq.quantize.embedding.weight.copy_(codes)
    for parameter in vq.state_dict().values():
        ranks.broadcast(parameter)
    freeze_encoder(autoencoder)


def freeze_encoder(autoencoder: Autoencoder) -> None:
    for module in (autoencoder.vq.encoder, autoencoder.vq.quant_conv, autoencoder.vq.quantize):
        module.requires_grad_(False)
        for parameter in module.parameters():
            parameter.grad = None


@torch.no_grad()
def write_sheet(autoencoder: Autoencoder, images: torch.Tensor, quantised: bool, file: Path) -> None:
    both = torch.stack([images, reconstruct(autoencoder, images, quantised)]).clamp(-1, 1)
    pixels = ((both + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    contact_sheet(pixels, file)


if __name__ == "__main__":
    run_script(main)
