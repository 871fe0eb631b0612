"""Stage 0b: train the identity-conditioned diffusion model (IDiff-Face, arXiv 2308.04995) on a folder of faces.

Reads   training.faces, contexts.recogniser (whose embeddings are the contexts), the first stage that
        train_autoencoder.py wrote or, where there is none, that of config `model`
Writes  <output>/training/<name>/: .hydra/config.yaml and checkpoints/ema_averaged_model.safetensors, the published layout,
        which sample.py loads (model.diffusion=<that folder>); diffusion.csv, curves.png, samples.png (held-out people, w =
        0); held_out_contexts.npz, people who were neither trained on nor chosen by; context_statistics.npz, mean and
        covariance of the contexts (contexts.source=gaussian); state to continue from
        <output>/faces/<folder>/: faces, contexts and latents, cached

    python train_diffusion.py training.faces=data/my-photos training.name=mine training.length=90min
    torchrun --nproc_per_node=8 train_diffusion.py --preset paper_ffhq

The checkpoint with the best FDR on contexts of held-out people is kept. Running the same command again continues.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler

from config import places
from config.config import Config
from config.load import load_config
from models.published import frozen, load_backbone, load_first_stage
from models.published_writer import trained_weights, write_diffusion
from models.schedule import linear_betas
from models.sizes import SIZES, unet_settings
from models.unet import ConditionalUNet
from utils.diffusion.latent_diffusion import LatentDiffusion
from utils.identities import contexts as identity_contexts
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import file_digest, write_npz
from utils.runtime.records import Record
from utils.training import faces as training_faces
from utils.training.draws import drawn_batches
from utils.training.extras import EXTRAS, Partners, context_scale
from utils.training.generator_loss import GeneratorBatches, GeneratorLoss
from utils.training.loop import Budget, Training
from utils.training.validation import held_out_scores, plot_curves

VALIDATIONS, VALIDATION_IDENTITIES = 5, 40
GRADIENT_CLIP = 1.0


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "model", "align", "training", "diffusion", "extras"),
                         choices={"training.size": SIZES, "extras.use": EXTRAS})
    settings, recipe, use, budget = config.training, config.diffusion, config.extras.use, Budget.parse(config.training.length)
    ranks = distributed.setup(config.device)
    folder, cache, size = places.training_folder(config), places.face_cache(config), SIZES[settings.size]
    if recipe.batch_size % ranks.world_size:
        raise UserError(f"diffusion.batch_size: {recipe.batch_size} is not divisible among {ranks.world_size} ranks; set "
                        f"{recipe.batch_size // ranks.world_size * ranks.world_size or ranks.world_size}")

    # faces, contexts and latents, computed once; people held out
    recogniser = frozen(load_backbone(config.contexts.recogniser), config.contexts.recogniser, ranks.device)
    faces = training_faces.prepare(settings.faces, settings.leave_out, settings.crop == "whole",
                                   config.align.minimum_face / 128, cache, ranks)
    crops = ranks.main_first(lambda: training_faces.crops(faces, cache, size["image_size"], faces.margin))
    contexts = ranks.main_first(lambda: training_faces.face_contexts(
        faces, cache, recogniser, Path(config.contexts.recogniser), ranks.device))
    encoder, decoder = first_stage_files(folder, config.model.first_stage_encoder, config.model.first_stage_decoder)
    ranks.print(f"the first stage is {encoder} and {decoder.name}")
    autoencoder = load_first_stage(encoder, decoder).to(ranks.device, memory_format=torch.channels_last).requires_grad_(False)
    latents = ranks.main_first(lambda: training_faces.face_latents(faces, crops, cache, autoencoder, encoder, ranks.device))
    rows, _, held_out_identities = training_faces.hold_out(faces, settings.held_out)
    validation, tests = validation_and_tests(faces.labels, held_out_identities)

    # network, its average, optimiser, schedule
    torch.manual_seed(settings.seed)
    dimension, latent_shape, betas = contexts.shape[1], latents.shape[2:], linear_betas()
    network_settings = unet_settings(settings.size, dimension) | {"input_channels": latent_shape[0]}
    prediction, scale = "v" if "v" in use else "eps", context_scale(use, dimension)
    unet = ConditionalUNet(**network_settings)
    if recipe.start_from:
        anew, _ = unet.load_state_dict(trained_weights(recipe.start_from, unet, scale, prediction), strict=False)
        ranks.print(f"begins with the weights of {recipe.start_from}" + (f", but for {', '.join(anew)}" if anew else ""))
    unet = unet.to(ranks.device, memory_format=torch.channels_last)
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer, scheduler = optimiser(unet, recipe.learning_rate, "adamw" in use)
    bf16 = distributed.use_bf16(settings.precision, ranks.device)
    compiled = partial(distributed.compiled, device=ranks.device) if settings.compile else lambda function: function
    loss = GeneratorLoss(unet, autoencoder, recogniser, betas, use, config.extras.identity, bf16, faces.margin,
                         compiled).to(ranks.device)

    # the run's record, and the state to continue from
    record = record_of(config, faces, (encoder, decoder))
    ranks.on_main(lambda: record.begin(config=asdict(config)))
    ranks.on_main(lambda: write_contexts(folder, faces, contexts, rows, tests))
    training = Training("diffusion", folder / "diffusion_state.pt", folder / "diffusion.csv", ranks, budget, optimizer,
                        {"unet": unet, "average": average}, clip=[(unet, GRADIENT_CLIP)], images=recipe.batch_size,
                        seed=settings.seed, scheduler=scheduler,
                        fix="begin with a lower diffusion.learning_rate and another training.name")
    training.restore()
    average.to(ranks.device)

    averaged = partial(averaged_network, average, network_settings, scale, ranks.device)

    def validate() -> dict[str, float]:
        model = LatentDiffusion(averaged(), autoencoder, betas, latent_shape, prediction, ranks.device, bf16)
        found = held_out_scores(model, contexts[validation], loss.embeddings_of_images, settings.seed, folder / "samples.png")
        plot_curves([*training.log, {"minutes": training.seconds / 60, "fdr": found["fdr"]}], folder / "curves.png")
        return found | {"score": found["fdr"]}

    def keep() -> None:
        write_diffusion(folder, network_settings, averaged().state_dict(), betas, size["image_size"], prediction)

    unet.train()
    batch = GeneratorBatches(latents, contexts, rows, Partners(faces.labels[rows]), use, len(betas), ranks.device)
    training.run(drawn_batches(len(rows), recipe.batch_size, settings.seed, ranks, batch), loss, validate, VALIDATIONS, keep=keep,
                 after_step=lambda: average.step(unet.parameters()))
    ranks.print(f"{folder}: {training.step} steps in {training.seconds / 60:.1f} minutes, best FDR {training.best:.3f} on "
                f"{len(validation)} held-out people; sample with model.diffusion={folder}; look at {folder / 'samples.png'}")
    ranks.close()


def validation_and_tests(labels: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A face of each held-out identity: of those that choose the checkpoint, and of those that choose nothing."""
    first_of = np.array([np.argmax(labels == identity) for identity in held_out])
    half = (len(first_of) + 1) // 2 if len(first_of) >= 4 else len(first_of)
    return first_of[: min(VALIDATION_IDENTITIES, half)], first_of[min(VALIDATION_IDENTITIES, half):]


def optimiser(unet: ConditionalUNet, rate: float, adamw: bool) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
    """The miniature's, whose schedule is the loop's, or IDiff-Face's."""
    if adamw:
        return torch.optim.AdamW(unet.parameters(), rate, **EXTRAS["adamw"]), None
    adam = torch.optim.Adam(unet.parameters(), rate)
    return adam, CosineAnnealingWarmRestarts(adam, T_0=10_000, T_mult=2)


def averaged_network(average: EMAModel, network_settings: dict[str, Any], scale: float, device: torch.device) -> ConditionalUNet:
    """The averaged network, which takes unit contexts though it was trained on scaled ones."""
    network = ConditionalUNet(**network_settings).to(device).eval()
    average.copy_to(network.parameters())
    network.context_emb.weight.data *= scale
    return network


def record_of(config: Config, faces: training_faces.TrainingFaces, first_stage: tuple[Path, Path]) -> Record:
    """The record of the training run: what decides it, and what may change on continuing."""
    folder, recipe, extras = places.training_folder(config), config.diffusion, config.extras
    return Record(folder / "diffusion.json", {
        **training_faces.decides(faces, asdict(config.training), config.contexts.recogniser),
        "first stage": list(map(file_digest, first_stage)),
        **{f"diffusion.{name}": getattr(recipe, name) for name in ("batch_size", "learning_rate", "start_from")},
        "extras.use": {name: EXTRAS[name] for name in sorted(extras.use)}}, "training.name",
        contents=folder / "diffusion_state.pt",
        may_change={"training.length": config.training.length, "extras.identity": extras.identity})


def first_stage_files(folder: Path, encoder: str, decoder: str) -> tuple[Path, Path]:
    """The first stage that train_autoencoder.py left in `folder`, else the given one. Raises UserError where it is unfinished."""
    own = folder / "first_stage_encoder.safetensors", folder / "first_stage_decoder.safetensors"
    if (folder / "autoencoder_state.pt").is_file() and not own[1].is_file():
        raise UserError(f"{own[1]}: is not there yet; finish train_autoencoder.py first, or set another training.name")
    return own if own[1].is_file() else (Path(encoder), Path(decoder))


def write_contexts(folder: Path, faces: training_faces.TrainingFaces, contexts: np.ndarray, rows: np.ndarray,
                   tests: np.ndarray) -> None:
    """The statistics of the contexts trained on, and the contexts of held-out people by whom no checkpoint is chosen."""
    trained_on = np.array(contexts[rows], dtype=np.float64)
    write_npz(folder / "context_statistics.npz", mean=trained_on.mean(axis=0).astype(np.float32),
              covariance=np.cov(trained_on, rowvar=False).astype(np.float32))
    if len(tests) >= 2:
        names = [faces.identities[faces.labels[row]].replace("/", " ") for row in tests]  # <folder>/<identity>; they name folders
        identity_contexts.write(folder / "held_out_contexts.npz", names, np.array(contexts[tests]))


if __name__ == "__main__":
    run_script(main)
