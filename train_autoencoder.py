"""Stage 0a: train the VQ first stage (VQ-f4 of LDM, arXiv 2112.10752) on a folder of faces.

Reads   training.faces, contexts.recogniser (its features and embeddings are part of the loss)
Writes  <output>/training/<name>/: first_stage_encoder.safetensors, first_stage_decoder.safetensors (LDM's names),
        autoencoder.csv, autoencoder.png (faces that were not trained on, above their reconstructions), state to continue
        <output>/faces/<folder>/: the faces that were found and cut out, cached

    python train_autoencoder.py training.faces=data/my-photos training.name=mine training.length=15min
    torchrun --nproc_per_node=4 train_autoencoder.py training.length=150000steps

It first learns to pass images through continuous latents. These are then brought to mean 0 and variance 1 (the
published model has no latent scale factor), the encoder is frozen, the codebook is put where the latents are (k-means),
and the decoder goes on learning from quantised latents. Running the same command again continues.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from config import places
from config.load import load_config
from models.autoencoder import Autoencoder, to_published
from models.patch_discriminator import PatchDiscriminator
from models.published import frozen, load_backbone
from models.sizes import SIZES
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import write_safetensors
from utils.runtime.records import Record
from utils.training import faces as training_faces
from utils.training.autoencoder_loss import ContinuousLoss, DecodingLoss, ImageBatches
from utils.training.draws import drawn_batches
from utils.training.loop import Budget, Training
from utils.training.quantisation import freeze_encoder, quantise
from utils.training.validation import reconstruction_scores

BATCH_SIZE, LEARNING_RATE = 16, 8e-4  # images on all devices together; of AdamW, at its highest
CONTINUOUS = 0.8  # of the training: then the encoder is frozen and latents are quantised
VALIDATIONS, VALIDATION_FACES = 50, 256


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "align", "training"), choices={"training.size": SIZES})
    settings, budget, ranks = config.training, Budget.parse(config.training.length), distributed.setup(config.device)
    folder, cache, size = places.training_folder(config), places.face_cache(config), SIZES[settings.size]
    if BATCH_SIZE % (2 * ranks.world_size):
        raise UserError(f"torchrun: {BATCH_SIZE} images per step do not give {ranks.world_size} ranks an even number each; start "
                        "2, 4 or 8")

    # the faces, those of the held-out identities apart
    recogniser = frozen(load_backbone(config.contexts.recogniser), config.contexts.recogniser, ranks.device)
    faces = training_faces.prepare(settings.faces, settings.leave_out, settings.crop == "whole",
                                   config.align.minimum_face / 128, cache, ranks)
    crops = ranks.main_first(lambda: training_faces.crops(faces, cache, size["image_size"], faces.margin))
    rows, held_out, _ = training_faces.hold_out(faces, settings.held_out)
    validation_rows = training_faces.some(held_out, VALIDATION_FACES)
    latent_shape = size["first_stage"]["code_channels"], *[size["image_size"] // 4] * 2
    require_latents(len(rows), latent_shape, size["first_stage"]["num_codes"])
    batches = ImageBatches(crops, rows, latent_shape, ranks.device)

    # autoencoder, and the recogniser and the discriminator that judge it
    torch.manual_seed(settings.seed)
    autoencoder = Autoencoder(**size["first_stage"]).to(ranks.device, memory_format=torch.channels_last)
    autoencoder.vq.quantize.requires_grad_(False)  # k-means fits it
    networks, bf16 = {"autoencoder": autoencoder}, distributed.use_bf16(settings.precision, ranks.device)
    if settings.adversarial:
        networks["discriminator"] = PatchDiscriminator().to(ranks.device, memory_format=torch.channels_last)

    def judge(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return recogniser.with_early_features(training_faces.of_canvas(images, faces.margin))

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

    def validate() -> dict[str, float]:
        parts = np.array_split(validation_rows, -(-len(validation_rows) // BATCH_SIZE))
        found = reconstruction_scores(autoencoder, map(batches.of, parts), lambda images: judge(images)[1],
                                      training.notes.get("quantised", False), bf16, folder / "autoencoder.png")
        return found | {"score": -found["pixel_error"]}

    # continuous, then quantised
    drawn = partial(drawn_batches, len(rows), BATCH_SIZE, settings.seed, ranks)
    compiled = partial(distributed.compiled, device=ranks.device) if settings.compile else lambda f: f
    if not training.notes.get("quantised"):
        training.run(drawn(make=batches.with_noise), ContinuousLoss(autoencoder, judge, bf16, compiled), validate, VALIDATIONS,
                     until=CONTINUOUS)
        quantise(autoencoder, rows, batches.of, ranks, settings.seed)
        training.notes["quantised"] = True
        training.save()
    freeze_encoder(autoencoder)
    training.run(drawn(make=batches.mirrored), DecodingLoss(autoencoder, judge, bf16, compiled, networks.get("discriminator"),
                                                            settings.adversarial), validate, VALIDATIONS)

    if ranks.is_main:
        encoder, decoder = to_published(autoencoder.cpu())
        write_safetensors(folder / "first_stage_encoder.safetensors", encoder)
        write_safetensors(folder / "first_stage_decoder.safetensors", decoder)
        print(f"{folder}: first_stage_encoder.safetensors, first_stage_decoder.safetensors; {training.step} steps, "
              f"pixel error {training.log[-1]['pixel_error']:.4f}; look at {folder / 'autoencoder.png'}")
    ranks.close()


def require_latents(faces: int, latent_shape: tuple[int, int, int], codes: int) -> None:
    """Raises UserError where the faces have fewer latents than there are codes to be placed among them."""
    latents = faces * latent_shape[1] * latent_shape[2]
    if latents < codes:
        raise UserError(f"training.faces: the {faces} faces to train on have {latents} latents, fewer than the {codes} codes "
                        "of the first stage; give more faces, or another training.size")


if __name__ == "__main__":
    run_script(main)
