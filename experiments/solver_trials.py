"""One trial: the images that a solver draws with one kind of guidance, and what is measured of them; kept in output/.

Every trial has the same contexts and the same noise: image k of identity i is the same one in all of them.
"""
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from config import places
from config.config import Config, Guidance
from models.prepacked import PREPACKED
from models.published import backbone_digest, load_backbone
from utils.diffusion import guidance, solvers, spacings
from utils.diffusion.fitted import FITTED
from utils.diffusion.latent_diffusion import LatentDiffusion, load_model, to_uint8
from utils.diffusion.noise import gaussian
from utils.evaluation import scores, variety
from utils.faces.detection import FaceDetector, choose_landmarks
from utils.faces.template import ARCFACE, LandmarkError, warp
from utils.identities import contexts as identity_contexts
from utils.identities import negatives as negative_contexts
from utils.recognition.embedding import embed
from utils.runtime.files import array_digest, file_digest, read_npz, write_npz
from utils.runtime.records import Record, State

ARMS = {"far": Guidance(w=0.5), "w0": Guidance(w=0.0), "adaptdiff": Guidance(w=1.0, schedule="linear")}  # arXiv 2603.29569
REPLICATES = 1000  # of the identities, for the 90% intervals
AGAINST_REAL = ("coverage", "recall")
METRICS = ("fdr", "eer", "fmr100", "genuine_mean", "genuine_std", "impostor_mean", "impostor_std")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Candidate:
    """A solver, its timesteps, and which negative passes it leaves out."""

    solver: str
    steps: int
    spacing: str = "default"
    rule: str = "negative"
    interval: tuple[int, int] | None = None  # in which w holds, with the schedule `constant` only

    def __str__(self) -> str:
        rule = "" if self.rule == "negative" else f" {self.rule}"
        return f"{self.solver} {self.spacing} {self.steps}{rule}" + (" {}..{}".format(*self.interval) if self.interval else "")

    def guidance(self, arm: str) -> Guidance:
        within = {"schedule": "interval", "interval": self.interval} if self.interval else {}
        return replace(ARMS[arm], rule=self.rule, **within)


@dataclass(frozen=True)
class Images:
    """The first `each` images of the first `identities` identities."""

    identities: int
    each: int

    def __str__(self) -> str:
        return f"{self.identities}x{self.each}"

    def __len__(self) -> int:
        return self.identities * self.each

    def numbers(self) -> list[tuple[int, int]]:
        return [(i, k) for i in range(self.identities) for k in range(self.each)]


@dataclass(frozen=True)
class Trial:
    """What a trial gave.

    latents [N, C, h, w] float32; seconds an image, decoding included where images were scored; found [N] bool: whose face
    was detected; by recogniser, METRICS and their replicates [REPLICATES] (empty where identities are too few), and, where
    real faces were given, AGAINST_REAL and their values of halves of the identities.
    """

    candidate: Candidate
    images: Images
    latents: np.ndarray
    seconds: float
    found: np.ndarray
    metrics: dict[str, dict[str, float]]
    replicates: dict[str, dict[str, np.ndarray]]
    of_halves: dict[str, dict[str, np.ndarray]]

    def distance(self, other: "Trial") -> float:
        """Rms difference of the latents of the images that both have, as a part of the other's standard deviation."""
        shared = Images(min(self.images.identities, other.images.identities), min(self.images.each, other.images.each))
        mine, theirs = (trial.latents.reshape(trial.images.identities, trial.images.each, -1)[: shared.identities, : shared.each]
                        for trial in (self, other))
        return float(np.sqrt(np.square(mine - theirs).mean()) / theirs.std())


class Laboratory:
    """The generator in fp32, the contexts, the recognisers, and every trial that was made with them on this kind of processor.

    Args:
        recognisers: files; they are named by their stem.
        real: by recogniser, the two halves of the unit embeddings of real faces.
        seed: of the noise.
    """

    def __init__(self, config: Config, recognisers: Sequence[Path], device: torch.device, seed: int,
                 real: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None) -> None:
        self.config, self.device, self.seed, self.real = config, device, seed, real or {}
        self.model, weights = load_model(config.model, config.sampling, device)
        ids, contexts = identity_contexts.read(places.contexts_file(config))
        digest = identity_contexts.digest(ids, contexts)
        negatives = negative_contexts.read(places.negatives_file(config), ids, contexts.shape[1], digest)
        self.contexts, self.negatives = (torch.from_numpy(rows).to(device) for rows in (contexts, negatives))
        self.recognisers = {file.stem: file for file in recognisers}
        self.kind = processor(device)
        self.decides = {"weights": [file_digest(file) for file in weights], "contexts": digest, "seed": seed,
                        "negatives": array_digest(negatives), "processor": self.kind}

    # ---- what it costs -----------------------------------------------------------------------------------------------

    @cached_property
    def gflop(self) -> dict[str, float]:
        return generator_gflop(self.model, self.device)

    def passes(self, arm: str, candidate: Candidate) -> dict[str, int]:
        """How many steps run `one` pass and how many `both`, by running the solver on next to nothing."""
        stub = Passes(self.model.T, self.model.alpha_bars)
        x = torch.ones(1, 1, 1, 1)
        denoise = guidance.guided(**asdict(candidate.guidance(arm)))(stub, x, x)
        solvers.sample(denoise, x, candidate.solver, self.timesteps(candidate), lambda t: x, False, self.model.betas)
        return stub.run

    def cost(self, arm: str, candidate: Candidate) -> float:
        """GFLOP an image, decoding apart."""
        return sum(self.gflop[name] * number for name, number in self.passes(arm, candidate).items())

    def timesteps(self, candidate: Candidate) -> list[int]:
        return spacings.timesteps(candidate.spacing, candidate.solver, candidate.steps, self.model.betas)

    # ---- a trial -----------------------------------------------------------------------------------------------------

    def record(self, arm: str, candidate: Candidate, images: Images, scored: bool) -> Record:
        recognisers = {name: [backbone_digest(file), *(array_digest(half) for half in self.real.get(name, ()))]
                       for name, file in self.recognisers.items()} if scored else {}
        deciding = {"align.minimum_face": self.config.align.minimum_face} if scored else {}
        if candidate.solver == "fitted":
            deciding["fitted"] = array_digest(np.concatenate(FITTED[candidate.steps]))
        file = places.solvers_folder(self.config) / arm / str(images) / f"{str(candidate).replace(' ', '-')}.npz"
        return Record(file.with_suffix(".json"), {
            **self.decides, "guidance": asdict(candidate.guidance(arm)), "solver": candidate.solver,
            "timesteps": self.timesteps(candidate), "recognisers": recognisers, **deciding}, target=file)

    def is_made(self, arm: str, candidate: Candidate, images: Images, scored: bool) -> bool:
        return self.record(arm, candidate, images, scored).state() is State.DONE

    def trial(self, arm: str, candidate: Candidate, images: Images, scored: bool) -> Trial:
        """Make a trial, or read it where it was made; `scored`: decode, detect, align and embed as the stages do."""
        record = self.record(arm, candidate, images, scored)
        names = [*self.recognisers] if scored else []
        if record.state() is not State.DONE:
            latents, faces, seconds = self._draw(arm, candidate, images, scored)
            found = np.array([face is not None for face in faces], bool)
            of_recognisers = {}
            for name in names:
                embeddings = embed(self.backbones[name], [face for face in faces if face is not None], self.device,
                                   read=lambda face: face)
                values, replicates, of_halves = measure(embeddings, found, images, self.real.get(name))
                of_recognisers |= {f"{name}_embeddings": embeddings, f"{name}_values": values, f"{name}_replicates": replicates,
                                   f"{name}_of_halves": of_halves}
            record.begin()
            write_npz(record.target, latents=latents, seconds=np.array(seconds), found=found, **of_recognisers)
        kept = read_npz(record.target, ["latents", "seconds", "found", *(
            f"{name}_{kind}" for name in names for kind in ("values", "replicates", "of_halves"))])
        return Trial(candidate, images, kept["latents"], float(kept["seconds"]), kept["found"], *(
            {name: dict(zip(of, kept[f"{name}_{kind}"], strict=False)) for name in names}  # fewer where some are not known
            for kind, of in (("values", METRICS + AGAINST_REAL), ("replicates", METRICS), ("of_halves", AGAINST_REAL))))

    @cached_property
    def backbones(self) -> Mapping[str, torch.nn.Module]:
        return {name: load_backbone(file) for name, file in self.recognisers.items()}

    @torch.inference_mode()
    def latents(self, arm: str, candidate: Candidate, batch: Sequence[tuple[int, int]], timesteps: Sequence[int]) -> Tensor:
        """x_0 [B, C, h, w] of images (identity, number)."""
        identities, numbers = map(list, zip(*batch, strict=True))
        noise = partial(gaussian, self.seed, identities, numbers, shape=self.model.latent_shape, device=self.device)
        guide = guidance.guided(**asdict(candidate.guidance(arm)))
        return self.model.latents(self.contexts[identities], self.negatives[identities], noise, guide, candidate.solver,
                                  timesteps)

    @torch.inference_mode()
    def _draw(self, arm: str, candidate: Candidate, images: Images, scored: bool) -> tuple[np.ndarray, list, float]:
        """Latents, aligned faces (None: not detected) where they are to be scored, and seconds an image without detection."""
        latents, faces, seconds = [], [], 0.0
        numbers, size, timesteps = images.numbers(), self.config.sampling.batch_size, self.timesteps(candidate)
        detector = FaceDetector(self.config.align.minimum_face / 128, self.device)
        for start in tqdm(range(0, len(numbers), size), desc=f"{arm}: {candidate}, {images}", unit="batch", leave=False):
            begun = time.perf_counter()
            x_0 = self.latents(arm, candidate, numbers[start : start + size], timesteps)
            pixels = to_uint8(self.model.autoencoder.decode(x_0)).cpu().numpy() if scored else []
            seconds += time.perf_counter() - begun
            latents.append(x_0.cpu().numpy())
            faces += [aligned(image, found) for image, found in zip(pixels, detector(list(pixels)), strict=True)]
        return np.concatenate(latents), faces, seconds / len(images)


def generator_gflop(model: LatentDiffusion, device: torch.device) -> dict[str, float]:
    """GFLOP an image: `one` pass, `both` passes in one batch, `decode`."""
    x, c = torch.zeros(1, *model.latent_shape, device=device), torch.zeros(1, model.unet.context_emb.in_features, device=device)
    calls = {"one": lambda: model.eps(x, 0, c), "both": lambda: model.eps_pair(x, 0, c, c),
             "decode": lambda: model.autoencoder.decode(x)}
    return {name: gflop(call) for name, call in calls.items()}


def gflop(call: Callable) -> float:
    """GFLOP of a call, counted."""
    def of_prepacked(x: torch.Size, weight: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PREPACKED, of_prepacked)) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


class Passes:
    """A model that counts its passes."""

    def __init__(self, T: int, alpha_bars: Sequence[float]) -> None:
        self.T, self.alpha_bars, self.run = T, alpha_bars, {"one": 0, "both": 0}

    def eps(self, x_t: Tensor, t: int, contexts: Tensor) -> Tensor:
        self.run["one"] += 1
        return x_t / 2

    def eps_pair(self, x_t: Tensor, t: int, c_pos: Tensor, c_neg: Tensor) -> tuple[Tensor, Tensor]:
        self.run["both"] += 1
        return x_t / 2, x_t / 2

    def alpha_bar(self, t: int) -> float:
        return self.alpha_bars[t]


def aligned(image: np.ndarray, faces: Sequence) -> np.ndarray | None:
    """The face of an image on the template [112, 112, 3] uint8, as align.py writes it; None where none is found."""
    try:
        return warp(image, choose_landmarks(faces, *image.shape[:2]), ARCFACE)
    except LandmarkError:
        return None


def measure(embeddings: np.ndarray, found: np.ndarray, images: Images, real: tuple[np.ndarray, np.ndarray] | None
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """METRICS of the faces that were found, then AGAINST_REAL; replicates [METRICS, REPLICATES]; of halves [AGAINST_REAL, N].

    There are no replicates where an identity has lost all of its faces, since they could not be compared, or identities are few.
    """
    labels = np.array([f"{i:06}" for i, _ in images.numbers()])[found]
    values = scores.metrics(scores.score_distributions(embeddings, labels))
    replicates = {}
    if len(np.unique(labels)) == images.identities >= scores.MIN_BOOTSTRAP_IDENTITIES:
        replicates = scores.bootstrap(embeddings, labels, REPLICATES)
    of_halves = {}
    if real:
        figures, of_halves = variety.against_real(embeddings, labels, real)
        values |= figures
    return (np.array([values[name] for name in (*METRICS, *AGAINST_REAL) if name in values]),
            np.array([replicates[name] for name in METRICS if replicates]),
            np.array([of_halves[name] for name in AGAINST_REAL if of_halves]))


def processor(device: torch.device) -> str:
    """The kind of processor: results of two kinds are never compared."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = [name for name, flag in {"AVX-512": "avx512f", "bfloat16": "avx512_bf16"}.items() if f" {flag} " in text]
    return ", ".join([*(models[:1] or [platform.machine()]), f"{torch.get_num_threads()} threads", *(flags or ["no AVX-512"])])
