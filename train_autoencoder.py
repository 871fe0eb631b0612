"""Stage 0a: train the VQ first stage (VQ-f4 of LDM, arXiv 2112.10752) on a folder of faces.

Reads   training.faces, contexts.recogniser (its features and embeddings are part of the loss)
Writes  <output>/training/<name>/: first_stage_encoder.safetensors, first_stage_decoder.safetensors (LDM's names),
        autoencoder.csv, autoencoder.png (faces that were not trained on, above their reconstructions), state to continue
        <output>/faces/<folder>/: the faces that were found and cut out, cached

    python train_autoencoder.py training.faces=data/my-photos training.name=mine training.length=15min
    torchrun --nproc_per_node=4 train_autoencoder.py

It first learns to pass images through continuous latents. These are then brought to mean 0 and variance 1 (the
published model has no latent scale factor), the encoder is frozen, the codebook is put where the latents are (k-means),
and the decoder goes on learning from quantised latents. Running the same command again continues.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional as F

from config import places
from config.load import load_config
from models.autoencoder import Autoencoder, to_published
from models.patch_discriminator import PatchDiscriminator
from models.published import load_backbone, require_gradients
from models.sizes import SIZES
from utils.diffusion.latent_diffusion import to_uint8
from utils.evaluation.reconstruction import reconstruction_errors
from utils.recognition.augmentation import normalise
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet
from utils.runtime.files import write_safetensors
from utils.runtime.records import Record
from utils.training import faces as training_faces
from utils.training.autoencoder_loss import ContinuousLoss, DecodingLoss
from utils.training.draws import Draws, drawn_batches
from utils.training.loop import Budget, Training

BATCH_SIZE, LEARNING_RATE = 16, 8e-4  # images on all devices together; of AdamW, at its highest
CONTINUOUS = 0.7  # of the training: then the encoder is frozen and latents are quantised
KMEANS_LATENTS = 400_000
VALIDATIONS, VALIDATION_FACES = 50, 256
SHEET = 12  # faces on the sheet


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "align", "training"), choices={"training.size": SIZES})
    settings, budget, ranks = config.training, Budget.parse(config.training.length), distributed.setup(config.device)
    folder, cache, size = places.training_folder(config), places.face_cache(config), SIZES[settings.size]
    if BATCH_SIZE % (2 * ranks.world_size):
        raise UserError(f"torchrun: {BATCH_SIZE} images per step do not give {ranks.world_size} ranks an even number each; start "
                        "2, 4 or 8")

    # the faces, those of the held-out identities apart
    recogniser = require_gradients(load_backbone(config.contexts.recogniser), config.contexts.recogniser)
    recogniser = recogniser.to(ranks.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    faces = training_faces.prepare(settings.faces, settings.leave_out, settings.crop == "whole",
                                   config.align.minimum_face / 128, cache, ranks)
    crops = ranks.main_first(lambda: training_faces.crops(faces, cache, size["image_size"], training_faces.MARGIN))
    rows, held_out, _ = training_faces.hold_out(faces, settings.held_out)
    validation_rows = held_out[np.linspace(0, len(held_out) - 1, min(VALIDATION_FACES, len(held_out)), dtype=int)]
    latents, codes = len(rows) * (size["image_size"] // 4) ** 2, size["first_stage"]["num_codes"]
    if latents < codes:
        raise UserError(f"training.faces: the {len(rows)} faces to train on have {latents} latents, fewer than the {codes} codes "
                        "of the first stage; give more faces, or another training.size")

    # autoencoder, and the recogniser that judges it
    torch.manual_seed(settings.seed)
    autoencoder = Autoencoder(**size["first_stage"]).to(ranks.device, memory_format=torch.channels_last)
    autoencoder.vq.quantize.requires_grad_(False)  # k-means fits it
    bf16 = distributed.use_bf16(settings.precision, ranks.device)
    discriminator = None
    if settings.adversarial:
        discriminator = PatchDiscriminator().to(ranks.device, memory_format=torch.channels_last)
    networks = {"autoencoder": autoencoder} | ({"discriminator": discriminator} if discriminator else {})
    margin = 0 if settings.crop == "whole" else training_faces.MARGIN

    def judge(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return recogniser.with_early_features(training_faces.of_canvas(images, margin))

    def batch_of(numbers: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(crops[numbers]).to(ranks.device, non_blocking=True).permute(0, 3, 1, 2)
        return normalise(images).contiguous(memory_format=torch.channels_last)

    def mirrored(draws: Draws, numbers: np.ndarray) -> tuple[torch.Tensor]:
        images = batch_of(rows[numbers])
        return (torch.where((draws.uniform() < 0.5)[:, None, None, None], images.flip(3), images),)

    def with_noise(draws: Draws, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images, = mirrored(draws, numbers)
        side = images.shape[-1] // autoencoder.factor
        return images, draws.normal(size["first_stage"]["code_channels"], side, side)

    # the run's record, and the state to continue from
    record = Record(folder / "autoencoder.json", {
        **training_faces.decides(faces, asdict(settings), config.contexts.recogniser),
        "training.adversarial": settings.adversarial or None}, "training.name", contents=folder / "autoencoder_state.pt",
        may_change={"training.length": settings.length})
    ranks.on_main(lambda: record.begin(config=asdict(config)))
    trained = [weight for network in networks.values() for weight in network.parameters() if weight.requires_grad]
    training = Training("autoencoder", folder / "autoencoder_state.pt", folder / "autoencoder.csv", ranks, budget,
                        torch.optim.AdamW(trained, LEARNING_RATE, betas=(0.9, 0.99)), networks,
                        clip=[(network, 1.0) for network in networks.values()], images=BATCH_SIZE, seed=settings.seed,
                        fix="begin with a lower LEARNING_RATE in train_autoencoder.py and another training.name")
    training.restore()

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """Reconstructions of held-out faces: the pixels' mean absolute difference (of 2), the mean cosine of the contexts'
        recogniser's embeddings, and reconstruction_errors."""
        quantised = training.notes.get("quantised", False)
        reconstructions, cosines = [], []
        for part in np.array_split(validation_rows, -(-len(validation_rows) // BATCH_SIZE)):
            images = batch_of(part)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                decoded = reconstruct(autoencoder, images, quantised).clamp(-1, 1)
                reconstructions.append((images.cpu(), decoded.float().cpu()))
                cosines.append(F.cosine_similarity(judge(images)[1], judge(decoded)[1]))
        images, decoded = (torch.cat(parts) for parts in zip(*reconstructions, strict=True))
        contact_sheet([to_uint8(row[:SHEET]).numpy() for row in (images, decoded)], folder / "autoencoder.png")
        error = (decoded - images).abs().mean().item()
        return {"pixel_error": error, "cosine": torch.cat(cosines).mean().item(), **reconstruction_errors(images, decoded),
                "score": -error}

    # continuous, then quantised
    batches = partial(drawn_batches, len(rows), BATCH_SIZE, settings.seed, ranks)
    compiled = partial(distributed.compiled, device=ranks.device) if settings.compile else lambda f: f
    if not training.notes.get("quantised"):
        training.run(batches(make=with_noise), ContinuousLoss(autoencoder, judge, bf16, compiled), validate, VALIDATIONS,
                     until=CONTINUOUS)
        quantise(autoencoder, crops, rows, batch_of, ranks, settings.seed)
        training.notes["quantised"] = True
        training.save()
    freeze_encoder(autoencoder)
    training.run(batches(make=mirrored), DecodingLoss(
        autoencoder, judge, bf16, compiled, discriminator, settings.adversarial), validate, VALIDATIONS)

    if ranks.is_main:
        encoder, decoder = to_published(autoencoder.cpu())
        write_safetensors(folder / "first_stage_encoder.safetensors", encoder)
        write_safetensors(folder / "first_stage_decoder.safetensors", decoder)
        print(f"{folder}: first_stage_encoder.safetensors, first_stage_decoder.safetensors; {training.step} steps, "
              f"pixel error {-training.best:.4f} at best; look at {folder / 'autoencoder.png'}")
    ranks.close()


def reconstruct(autoencoder: Autoencoder, images: torch.Tensor, quantised: bool) -> torch.Tensor:
    latents = autoencoder.encode(images).float()
    return autoencoder.decode(latents) if quantised else autoencoder.vq.decode(latents, force_not_quantize=True).sample


@torch.no_grad()
def quantise(autoencoder: Autoencoder, crops: np.ndarray, rows: np.ndarray, batch_of: Callable[[np.ndarray], torch.Tensor],
             ranks: distributed.Ranks, seed: int) -> None:
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


if __name__ == "__main__":
    run_script(main)
