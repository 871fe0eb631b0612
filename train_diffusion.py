"""Stage 0b: train the identity-conditioned diffusion model (IDiff-Face, arXiv 2308.04995) on a folder of faces.

Reads   training.faces, training.recogniser (whose embeddings are the contexts), the first stage that
        train_autoencoder.py wrote or, where there is none, that of config `model`
Writes  <output>/training/<name>/: .hydra/config.yaml and checkpoints/ema_averaged_model.safetensors, the published layout,
        which sample.py loads (model.diffusion=<that folder>); diffusion.csv, curves.png, samples.png (held-out people, w =
        0); held_out_contexts.npz, people who were neither trained on nor chosen by; context_statistics.npz, mean and
        covariance of the contexts (contexts.source=gaussian); state to continue from
        <output>/faces/<folder>/: faces, contexts and latents, cached

    python train_diffusion.py training.faces=data/my-photos training.name=mine
    torchrun --nproc_per_node=8 train_diffusion.py --preset paper_ffhq

The checkpoint with the best FDR on contexts of held-out people is kept. Running the same command again continues.
"""
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from config.load import load_config
from models.published import EPS_PREFIX, load_backbone, load_diffusion, load_first_stage, schedule_tables
from models.state_dicts import first_difference
from models.unet import ConditionalUNet
from utils.diffusion.latent_diffusion import draw, eps_of_v, to_uint8
from utils.diffusion.noise import gaussian
from utils.diffusion.solvers import linear_betas
from utils.evaluation import scores
from utils.identities import contexts as contexts_files
from utils.recognition.augmentation import normalise
from utils.recognition.recogniser_training import faces as training_faces
from utils.recognition.recogniser_training import read_lines, read_state, seed_step
from utils.runtime import files as runs
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet, save_figure
from utils.training.loop import (
    Average,
    Budget,
    Draws,
    average_gradients,
    batch_rows,
    check_finite,
    check_judge,
    flat_then_cosine,
    held_out,
    warm_restarts,
)

REPORT_SECONDS, SAVE_SECONDS = 60, 300
VALIDATION_IDENTITIES, VALIDATION_IMAGES, VALIDATION_STEPS = 40, 4, 15  # DPM-Solver++ steps
# The recogniser judges predictions from noisy images that the network makes itself, as in sampling: those of the training
# images already show who it is, and the context would be of little use. A part of a batch, so many steps, down to a
# timestep at which much is still open.
IDENTITY_PART, IDENTITY_STEPS, IDENTITY_T = 0.125, 4, (200, 700)
SHEET = (8, 4)
LOG_COLUMNS = ("step", "minutes", "loss", "learning_rate", "images_per_second", "fdr", "genuine", "impostor")


def main() -> None:
    config = load_config(__doc__)
    ranks = distributed.setup(config.device)
    settings, training, model = config.diffusion, config.training, config.model
    folder, cache = runs.training_folder(config), runs.face_cache(config)
    if settings.batch_size % ranks.world_size:
        raise UserError(f"diffusion.batch_size: {settings.batch_size} is not divisible among {ranks.world_size} ranks; set "
                        f"{settings.batch_size // ranks.world_size * ranks.world_size or ranks.world_size}")

    # faces, contexts and latents, computed once; people set apart
    recogniser = load_backbone(training.recogniser).to(ranks.device, memory_format=torch.channels_last).requires_grad_(False)
    check_judge(recogniser, training.recogniser)
    leave_out = read_lines(training.leave_out, "training.leave_out", "give one name a line") if training.leave_out else ()
    faces, crops, contexts = training_faces.prepare(
        training.faces, leave_out, training.crop == "whole", config.align.minimum_face / 128, training.image_size,
        training.margin, recogniser, Path(training.recogniser), cache, ranks)
    own = folder / "first_stage_encoder.safetensors", folder / "first_stage_decoder.safetensors"
    if (folder / "autoencoder_state.pt").is_file() and not own[0].is_file():
        raise UserError(f"{own[0]}: is not there yet; finish train_autoencoder.py first, or set another training.name")
    first_stage = own if own[0].is_file() else (Path(model.first_stage_encoder), Path(model.first_stage_decoder))
    ranks.print(f"the first stage is {first_stage[0]} and {first_stage[1].name}")
    autoencoder = load_first_stage(*first_stage).to(ranks.device, memory_format=torch.channels_last).requires_grad_(False)
    bf16 = distributed.use_bf16(training.precision, ranks.device)
    if ranks.is_main:
        latents_of(crops, faces, autoencoder, first_stage[0], cache, ranks.device)
    ranks.barrier()
    latents = latents_of(crops, faces, autoencoder, first_stage[0], cache, ranks.device)
    is_held_out, held_out_identities = held_out(faces.labels, len(faces.identities), training.held_out_identities)
    rows = np.flatnonzero(~is_held_out)
    partners = Partners(faces.labels[rows])
    first_of = np.array([np.argmax(faces.labels == identity) for identity in held_out_identities])
    half = (len(first_of) + 1) // 2 if len(first_of) >= 4 else len(first_of)
    validation, tests = np.split(first_of, [min(VALIDATION_IDENTITIES, half)])

    # network, schedule, optimiser
    torch.manual_seed(training.seed)
    dimension, latent_shape = contexts.shape[1], latents.shape[2:]
    unet_settings = {
        "input_channels": latent_shape[0], "initial_channels": settings.initial_channels,
        "channel_multipliers": list(settings.channel_multipliers), "is_attention": list(settings.attention),
        "attention_heads": -1, "attention_head_channels": 32, "n_blocks_per_resolution": settings.blocks,
        "condition_type": "CA", "is_context_conditional": True, "n_context_classes": 0,
        "context_input_channels": dimension, "context_channels": settings.context_channels, "learn_empty_context": False,
        "context_dropout_probability": settings.context_dropout}
    context_scale = dimension**0.5 if settings.scale_contexts else 1.0
    unet = ConditionalUNet(**unet_settings)
    if settings.start_from:
        unet.load_state_dict(trained_weights(settings.start_from, unet, context_scale, settings.prediction))
    unet = unet.to(ranks.device, memory_format=torch.channels_last)
    average = Average(unet)
    betas = linear_betas()
    alpha_bars = torch.cumprod(1 - betas.double(), dim=0).float().to(ranks.device)
    optimizer = torch.optim.Adam(unet.parameters(), settings.learning_rate) if settings.optimizer == "adam" else \
        torch.optim.AdamW(unet.parameters(), settings.learning_rate, weight_decay=0.01)
    margin = None if training.crop == "whole" else training.margin

    # the run's record, and the state to continue from
    if ranks.is_main:
        decides = asdict(settings) | {"faces": faces.digest, "crop": training.crop, "margin": training.margin,
                                      "image_size": training.image_size, "seed": training.seed,
                                      "held_out_identities": training.held_out_identities,
                                      "recogniser": runs.file_digest(training.recogniser),
                                      "first_stage": [runs.file_digest(file) for file in first_stage]}
        for free in ("minutes", "steps", "validations", "identity"):
            decides.pop(free)
        runs.claim_run(folder / "diffusion.json", decides, {"config": asdict(config)}, "training.name")
        write_test_contexts(folder, faces, contexts, tests)
        trained_on = np.array(contexts[rows], dtype=np.float64)
        runs.write_npz(folder / "context_statistics.npz", mean=trained_on.mean(axis=0).astype(np.float32),
                       covariance=np.cov(trained_on, rowvar=False).astype(np.float32))
    ranks.barrier()
    budget, log, best = Budget(settings.minutes, settings.steps, ranks), [], -1.0
    state_file = folder / "diffusion_state.pt"
    if state_file.is_file():
        state = read_state(state_file, ranks.device)
        unet.load_state_dict(state["unet"])
        average.weights = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        log, best = state["log"], state["best"]
        budget = Budget(settings.minutes, settings.steps, ranks, state["step"], state["seconds"])
        ranks.print(f"continues after step {budget.step}, {budget.seconds / 60:.1f} minutes")

    def save() -> None:
        if ranks.is_main:
            runs.write_torch(state_file, {
                "unet": unet.state_dict(), "average": average.weights, "optimizer": optimizer.state_dict(),
                "log": log, "best": best, "step": budget.step, "seconds": budget.seconds})

    # on a CPU the fused attention's backward pass is several times slower than plain matrix products
    attention = partial(sdpa_kernel, SDPBackend.MATH) if ranks.device.type == "cpu" else nullcontext

    def predict(x_t: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16), attention():
            return unet(x_t, t, c).float()

    def diffusion_loss(x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, c: torch.Tensor,
                       own: torch.Tensor) -> torch.Tensor:
        """The squared error of eps or v (DDPM, arXiv 2006.11239, equation 14), and how far identities are missed."""
        alpha_bar = alpha_bars[t][:, None, None, None]
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        wanted = noise if settings.prediction == "eps" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
        loss = F.mse_loss(predict(x_t, t, c), wanted)
        if settings.identity == 0:
            return loss
        judged = slice(max(1, int(IDENTITY_PART * len(t))))
        return loss + settings.identity * identity_loss(noise[judged], t[judged], own[judged])

    def identity_loss(x_t: torch.Tensor, t: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """1 - cosine between contexts and the embeddings of x_0, predicted after some steps of DDIM from the prior."""
        low, high = IDENTITY_T
        last = low + t * (high - low) // len(betas)
        for step in range(IDENTITY_STEPS + 1):
            here, below = (len(betas) - 1 + (last - len(betas) + 1) * k // IDENTITY_STEPS
                           for k in (step, min(step + 1, IDENTITY_STEPS)))
            alpha_bar, next_alpha_bar = (alpha_bars[k][:, None, None, None] for k in (here, below))
            with torch.set_grad_enabled(step == IDENTITY_STEPS):
                predicted = predict(x_t, here, own * context_scale)
                eps = predicted if settings.prediction == "eps" else eps_of_v(predicted, x_t, alpha_bar)
                x_0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
                x_t = next_alpha_bar.sqrt() * x_0 + (1 - next_alpha_bar).sqrt() * eps
        # on CPUs these two are no faster in bfloat16
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16 and ranks.device.type != "cpu"):
            images = autoencoder.vq.decode(x_0, force_not_quantize=True).sample
            embeddings = recogniser(training_faces.of_canvas(images, margin), "arcface")
        return (1 - F.cosine_similarity(embeddings.float(), own)).mean()

    compiled = training.compile and ranks.device.type == "cuda"  # on CPUs it was not faster
    loss_of = torch.compile(diffusion_loss) if compiled else diffusion_loss

    @torch.no_grad()
    def validate() -> tuple[float, float, float]:
        """FDR, genuine and impostor mean of images of held-out people, w = 0, by the recogniser of the contexts."""
        network = ConditionalUNet(**unet_settings)
        network.load_state_dict(average.weights)
        network = network.to(ranks.device, memory_format=torch.channels_last).eval()
        labels = np.repeat(np.arange(len(validation)), VALIDATION_IMAGES)
        numbers = np.tile(np.arange(VALIDATION_IMAGES), len(validation))
        images = []
        for start in range(0, len(labels), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            c = torch.from_numpy(contexts[validation[labels[batch]]] * context_scale).to(ranks.device)

            def noise(t: int, batch=batch) -> torch.Tensor:
                return gaussian(training.seed, labels[batch].tolist(), numbers[batch].tolist(), t, latent_shape,
                                ranks.device)

            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                x_0 = draw(network, c, None, lambda t: 0, noise, "dpm++", VALIDATION_STEPS, betas,
                           prediction=settings.prediction)
                images.append(autoencoder.decode(x_0).float().clamp(-1, 1))
        images = torch.cat(images)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            embeddings = torch.cat([recogniser(training_faces.of_canvas(part, margin), "arcface")
                                    for part in images.split(64)]).float()
        found = scores.metrics(scores.score_distributions(embeddings.cpu().numpy(), labels, torch.device("cpu")))
        pixels = to_uint8(images).cpu().numpy().reshape(len(validation), VALIDATION_IMAGES, *images.shape[2:], 3)
        contact_sheet(pixels[: SHEET[0], : SHEET[1]], folder / "samples.png")
        return found["fdr"], found["genuine_mean"], found["impostor_mean"]

    def batch_of(step: int) -> tuple[torch.Tensor, ...]:
        """x_0, noise, t, contexts as the network sees them, contexts as they are; this rank's share of a step."""
        draws = Draws(training.seed, step, settings.batch_size, ranks)
        numbers = batch_rows(len(rows), settings.batch_size, training.seed, step, ranks)
        mirrored = (draws.uniform() < 0.5).cpu().numpy() & settings.flip
        x_0 = torch.from_numpy(latents[mirrored.astype(int), rows[numbers]].astype(np.float32)).to(ranks.device)
        noise = draws.normal(*latent_shape)
        x_0 = x_0 + settings.latent_noise * draws.normal(*latent_shape)
        t = draws.integers(len(betas))
        own = torch.from_numpy(contexts[rows[numbers]]).to(ranks.device)
        other = rows[partners.other(numbers, draws.uniform().cpu().numpy())]
        c = torch.where((draws.uniform() < settings.same_person)[:, None],
                        torch.from_numpy(contexts[other]).to(ranks.device), own) * context_scale
        c = c + settings.context_noise * context_scale / dimension**0.5 * draws.normal(dimension)
        c = torch.where((draws.uniform() < settings.null_contexts)[:, None], 0.0, c)
        return x_0.contiguous(memory_format=torch.channels_last), noise, t, c, own

    # the loop
    saved = reported = time.monotonic()
    first_step = reported_step = budget.step
    validated = int(budget.progress * settings.validations)
    total = torch.zeros((), device=ranks.device)
    bar = tqdm(total=100, unit="%", disable=not ranks.is_main, desc="train the diffusion model",
               bar_format="{desc}: {n:.1f}% |{bar}| {elapsed}<{remaining}{postfix}", mininterval=1)
    is_over = not budget.go_on()
    while not is_over:
        begin_step = time.monotonic()
        rate = settings.learning_rate * (flat_then_cosine(budget.progress) if settings.schedule == "flat_cosine" else
                                         warm_restarts(budget.step))
        for group in optimizer.param_groups:
            group["lr"] = rate
        seed_step(training.seed, 0, budget.step, ranks.rank)
        unet.train()
        loss = loss_of(*batch_of(budget.step))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(ranks, list(unet.parameters()))
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        budget.step += 1
        average.update(unet, budget.step)
        if budget.step == first_step + 1 and compiled:
            budget.exclude(begin_step)  # the first step compiles
        total += loss.detach()
        is_over = not budget.go_on()
        bar.update(100 * budget.progress - bar.n)

        validation_is_due = is_over or int(budget.progress * settings.validations) > validated
        if validation_is_due or ranks.agree(time.monotonic() - reported > REPORT_SECONDS):
            steps = budget.step - reported_step
            mean = ranks.sum([total.item()])[0] / steps / ranks.world_size
            check_finite(mean, norm, state_file, budget.step, "diffusion.learning_rate")
            speed = steps * settings.batch_size / (time.monotonic() - reported)
            found = (None, None, None)
            if validation_is_due:
                validated = int(budget.progress * settings.validations)
                if ranks.is_main:
                    found = validate()
                    tqdm.write("after {:.1f} minutes, step {}: FDR {:.3f}, genuine {:.3f}, impostor {:.3f}".format(
                        budget.seconds / 60, budget.step, *found))
                    if found[0] > best:
                        best = found[0]
                        write_model(folder, unet_settings, average.weights, context_scale, betas, training.image_size,
                                    settings.prediction)
                ranks.barrier()
            log.append((budget.step, budget.seconds / 60, mean, rate, speed, *found))
            bar.set_postfix_str(f" loss {mean:.4f}, {speed:.0f} images/s")
            if ranks.is_main:
                runs.write_csv(folder / "diffusion.csv", LOG_COLUMNS, log)
                plot_curves(log, folder / "curves.png")
            reported, reported_step = time.monotonic(), budget.step
            total.zero_()
            if ranks.agree(time.monotonic() - saved > SAVE_SECONDS):
                save()
                saved = time.monotonic()
    bar.close()
    save()
    ranks.print(f"{folder}: {budget.step} steps in {budget.seconds / 60:.1f} minutes, best FDR {best:.3f} on "
                f"{len(validation)} held-out people; sample with model.diffusion={folder}; look at {folder / 'samples.png'}")
    ranks.close()


def latents_of(crops: np.ndarray, faces: training_faces.TrainingFaces, autoencoder, encoder_file: Path, cache: Path,
               device: torch.device) -> np.ndarray:
    """The latents of the crops and of their mirror images, [2, N, C, h, w] float16, memory-mapped; made once."""
    encoder = runs.file_digest(encoder_file)
    size = crops.shape[1] // autoencoder.factor
    channels = autoencoder.vq.quant_conv.out_channels

    @torch.inference_mode()
    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", np.float16, (2, len(crops), channels, size, size))
        for start in tqdm(range(0, len(crops), 64), desc="encode", unit="batch"):
            images = torch.from_numpy(np.array(crops[start : start + 64])).to(device).permute(0, 3, 1, 2)
            images = normalise(images).contiguous(memory_format=torch.channels_last)
            for side, shown in enumerate((images, images.flip(3))):
                array[side, start : start + 64] = autoencoder.encode(shown).float().cpu().numpy()
        array.flush()

    name = f"latents-{crops.shape[1]}-{encoder[:8]}.npy"
    return training_faces.cached_array(cache / name, runs.text_digest(f"{faces.digest} {encoder} {crops.shape}"), write)


class Partners:
    """Other images of the same person.

    Args:
        labels: [N] identities, those of one person side by side.
    """

    def __init__(self, labels: np.ndarray) -> None:
        _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.count = first[inverse], counts[inverse]

    def other(self, numbers: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """For each image number another one of the same person, by a number in [0, 1); itself where there is none."""
        first, others = self.first[numbers], self.count[numbers] - 1
        step = 1 + np.minimum((uniform * others).astype(int), np.maximum(others - 1, 0))
        return first + (numbers - first + step) % self.count[numbers]


def write_model(folder: Path, unet_settings: dict, weights: dict[str, torch.Tensor], context_scale: float,
                betas: torch.Tensor, image_size: int, prediction: str) -> None:
    """Write the published layout: what models.published.load_diffusion reads."""
    # the network was trained on scaled contexts: the scale moves into the layer that reads them
    weights = weights | {"context_emb.weight": weights["context_emb.weight"] * context_scale}
    eps_model = {EPS_PREFIX + name: tensor for name, tensor in weights.items()}
    runs.write_safetensors(folder / "checkpoints" / "ema_averaged_model.safetensors", schedule_tables(betas) | eps_model)
    runs.write_text(folder / ".hydra" / "config.yaml", yaml.safe_dump({
        "latent_diffusion": True, "constants": {"image_size": image_size}, "model": unet_settings,
        "diffusion": {"T": len(betas), "schedule_type": "linear", "prediction": prediction}}, sort_keys=False))


def trained_weights(folder: str, unet: ConditionalUNet, context_scale: float, prediction: str) -> dict[str, torch.Tensor]:
    """The weights that write_model wrote, for training to go on with; UserError where they are of another network."""
    trained, described = load_diffusion(folder)
    weights = trained.state_dict()
    fault = first_difference(unet.state_dict(), weights)
    if not fault and described["prediction"] != prediction:
        fault = f"it predicts {described['prediction']}"
    if fault:
        raise UserError(f"diffusion.start_from: {folder} is another network than the settings of diffusion describe: "
                        f"{fault}; give the settings it was trained with")
    return weights | {"context_emb.weight": weights["context_emb.weight"] / context_scale}


def write_test_contexts(folder: Path, faces: training_faces.TrainingFaces, contexts: np.ndarray, tests: np.ndarray) -> None:
    """The contexts of held-out people by whom no checkpoint is chosen, where there are two or more of them."""
    if len(tests) >= 2:
        contexts_files.write(folder / "held_out_contexts.npz",
                             [faces.identities[faces.labels[row]] for row in tests], np.array(contexts[tests]))


def plot_curves(log: list[tuple], file: Path) -> None:
    minutes, losses, fdrs = ([row[column] for row in log] for column in (1, 2, 5))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axes, fdr_axes = figure.subplots(1, 2)
    loss_axes.plot(minutes, losses)
    loss_axes.set(title="loss", xlabel="minutes", yscale="log")
    scored = [(minute, fdr) for minute, fdr in zip(minutes, fdrs, strict=True) if fdr is not None]
    if scored:
        fdr_axes.plot(*zip(*scored, strict=True), marker=".")
    fdr_axes.set(title="FDR on held-out people, w = 0", xlabel="minutes")
    save_figure(figure, file)


if __name__ == "__main__":
    run_script(main)
