"""Training a recogniser: its images and their order, one step, the score on held-out people."""
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.margin_heads import MarginHead
from utils.evaluation.scores import metrics, score_distributions
from utils.faces.folders import PackedFaces
from utils.recognition.dynunc import dynamic_uncertainty, keep_list
from utils.recognition.embedding import embed
from utils.runtime.errors import UserError
from utils.runtime.figures import save_figure
from utils.runtime.files import atomic_write, require_file, write_npz, write_text
from utils.runtime.ranks import Ranks, compiled

MOST_HELD_OUT = 500  # identities; with the paper's 50 images each, 600,000 genuine pairs


@dataclass(frozen=True)
class TrainingSet:
    """The rows of a packed array that are trained on, and those of people set apart to steer the training.

    Attributes:
        rows, labels: [N] int64 and [N] int64 in 0 .. num_classes - 1, each class with at least one image.
        held_out_rows, held_out_labels: [M] int64.
        held_out_identities: names.
        empty_identities: names of those that a keep-list left without an image; they are no classes.
    """

    rows: np.ndarray
    labels: np.ndarray
    num_classes: int
    held_out_rows: np.ndarray
    held_out_labels: np.ndarray
    held_out_identities: list[str]
    empty_identities: list[str]


def training_set(packed: PackedFaces, held_out: int, keep: Sequence[str] | None) -> TrainingSet:
    """Set `held_out` identities apart, evenly spread over those with two images or more, and keep what `keep` names.

    Args:
        held_out: 0: a tenth of the identities, 2 to MOST_HELD_OUT.
        keep: `<identity>/<image>` of the images to train on; None: all. It does not change who is held out.
    Raises:
        UserError: too few identities, or `keep` names an image that is not there.
    """
    names, count = packed.identities, len(packed.identities)
    with_pairs = np.flatnonzero(np.bincount(packed.labels, minlength=count) >= 2)
    held_out = held_out or min(MOST_HELD_OUT, max(2, count // 10))
    most = min(len(with_pairs), count - 2)
    if not 2 <= held_out <= most:
        raise UserError(f"fr.held_out_identities: {held_out} cannot be set apart from {count} identities, "
                        f"{len(with_pairs)} of them with two images or more; "
                        + (f"set 2 to {most}" if most >= 2 else "give more identities"))
    held_out_numbers = with_pairs[np.arange(held_out) * len(with_pairs) // held_out]
    is_held_out = np.isin(packed.labels, held_out_numbers)
    trained = ~is_held_out
    if keep is not None:
        unknown = set(keep) - set(packed.paths.tolist())
        if unknown:
            raise UserError(f"fr.keep_list: names {min(unknown)}, which is not among the images; give the folder and "
                            "the limits of the training that wrote the list")
        trained &= np.isin(packed.paths, list(keep))
    rows = np.flatnonzero(trained)
    classes, labels = np.unique(packed.labels[rows], return_inverse=True)
    held_out_rows = np.flatnonzero(is_held_out)
    empty = np.setdiff1d(np.arange(count), np.concatenate([classes, held_out_numbers]))
    return TrainingSet(rows, labels, len(classes), held_out_rows, packed.labels[held_out_rows],
                       names[held_out_numbers].tolist(), names[empty].tolist())


def read_lines(file: str, setting: str, mend: str) -> list[str]:
    """The lines of a list that the setting names. Raises UserError where there is no such file."""
    text = require_file(file, setting, mend).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def epoch_order(images: int, total_batch: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """A new order for each epoch, the same on every rank.

    Returns:
        The images of each step [steps, total_batch], and those that the dropped last partial batch leaves out.
    Raises:
        UserError: fewer images than one batch.
    """
    steps, spare = divmod(images, total_batch)
    if steps == 0:
        raise UserError(f"fr.batch_size: one batch on all devices takes {total_batch} images, there are {images}; "
                        "lower it")
    # In turn, so that no image is left out more often than another: DynUnc needs to see each of them again and again.
    turns = np.random.default_rng(seed).permutation(images)
    dropped = turns[(epoch * spare + np.arange(spare)) % images]
    shown = np.setdiff1d(np.arange(images), dropped)
    return np.random.default_rng((seed, epoch)).permutation(shown).reshape(steps, total_batch), dropped


class Trainer:
    """Backbone, head and optimiser, replicated over the ranks.

    Args:
        learning_rate: of this total batch.
        gradient_clip: largest norm of the gradient, of backbone and head separately.
        bf16: compute the backbone in bfloat16; weights, embeddings and head stay in fp32.
        compile: fuse the backbone's operations by torch.compile.
    """

    def __init__(self, backbone: nn.Module, head: MarginHead, ranks: Ranks, learning_rate: float, momentum: float,
                 weight_decay: float, gradient_clip: float, bf16: bool, compile: bool) -> None:
        self.backbone = backbone.to(ranks.device, memory_format=torch.channels_last)
        self.head = head.to(ranks.device)
        self.device, self.bf16, self.gradient_clip = ranks.device, bf16, gradient_clip
        weights = [p for module in (self.backbone, self.head) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(weights, learning_rate, momentum, weight_decay=weight_decay)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        # The replicas share the weights of backbone and head, which alone are saved.
        self.backbone_replica = compiled(self.backbone, ranks.device, "fr.compile") if compile else self.backbone
        self.head_replica = self.head
        if ranks.world_size > 1:
            # Each rank's batch norms keep their own running statistics, rank 0's are saved: as published.
            self.backbone_replica = DistributedDataParallel(self.backbone_replica, broadcast_buffers=False)
            self.head_replica = DistributedDataParallel(self.head)

    def step(self, faces: torch.Tensor, labels: torch.Tensor,
             with_probabilities: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One update. Nothing here waits for the device.

        Args:
            faces: [B, 3, 112, 112] in [-1, 1].
            labels: [B] int64.
        Returns:
            The batch's loss; the norm of the gradient over all ranks; before the update, each image's probability of
            its class without the margin [B], if wanted.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.backbone_replica(faces)
            loss = F.cross_entropy(self.head_replica(embeddings, labels), labels)
        probabilities = self.head.probability(embeddings, labels) if with_probabilities else None
        self.optimizer.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(module.parameters(), self.gradient_clip)
                 for module in (self.backbone, self.head)]
        self.optimizer.step()
        return loss.detach(), torch.stack(norms).norm(), probabilities

    def state_dict(self) -> dict[str, dict]:
        return {"backbone": self.backbone.state_dict(), "head": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self.backbone.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train(self, mode: bool = True) -> None:
        self.backbone.train(mode)
        self.head.train(mode)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a step draws (dropout), so that a continued training draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1)[0]))


def gather(ranks: Ranks, *tensors: torch.Tensor) -> None:
    """Sum tensors over the ranks, in place: rank 0 holds the sum, the others start again from zero."""
    if ranks.world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            if not ranks.is_main:
                tensor.zero_()


def read_state(file: Path, device: torch.device) -> dict:
    """What write_torch saved. Raises UserError where the file is damaged."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: is damaged ({error}); delete it, and the training begins anew") from None


def verification_accuracy(backbone: nn.Module, images: np.ndarray, rows: np.ndarray, labels: np.ndarray,
                          device: torch.device, bf16: bool) -> float:
    """1 - EER over all pairs of the faces `rows` [M] of a packed array; the backbone is left in eval mode."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        embeddings = embed(backbone, rows, device, "arcface", batch_size=256, read=images.__getitem__)
    return 1 - metrics(score_distributions(embeddings, labels, device))["eer"]


def open_probabilities(file: Path, epochs: int, images: int) -> np.ndarray:
    """The memory map [epochs or more, N] float32 of each image's probability of its class, NaN where not recorded.

    A file of fewer epochs grows and keeps its rows.
    """
    earlier = np.load(file, allow_pickle=False, mmap_mode="r") if file.is_file() else np.empty((0, images), np.float32)
    if len(earlier) < epochs:
        rows = np.full((epochs, images), np.nan, np.float32)
        rows[:len(earlier)] = earlier
        with atomic_write(file) as temporary, open(temporary, "wb") as array:
            np.save(array, rows, allow_pickle=False)
    return np.load(file, allow_pickle=False, mmap_mode="r+")


def write_dynunc(folder: Path, probabilities: np.ndarray, paths: np.ndarray, window: int,
                 fractions: Sequence[float]) -> list[Path]:
    """Write `dynunc_scores.npz` (paths, scores [N]) and a keep-list, the paths to keep, for each fraction.

    Args:
        probabilities: [epochs, N].
        paths: [N] `<identity>/<image>`.
        window: sliding window in epochs; a training that stopped earlier is one window.
    Returns:
        The keep-lists' files.
    """
    scores = dynamic_uncertainty(probabilities, min(window, len(probabilities)))
    write_npz(folder / "dynunc_scores.npz", paths=paths, scores=scores)
    files = []
    for fraction in fractions:
        files.append(folder / f"keep_{fraction:g}.txt")
        write_text(files[-1], "".join(f"{path}\n" for path in paths[keep_list(scores, fraction)]))
    return files


def plot_curves(log: Sequence[Sequence[float]], file: Path) -> None:
    """Loss, held-out accuracy and learning rate over the epochs, from rows of (epoch, loss, accuracy, rate, ...)."""
    epochs, losses, accuracies, rates = (list(column) for column in list(zip(*log, strict=True))[:4])
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, values, title in zip(figure.subplots(1, 3), (losses, accuracies, rates),
                                   ("loss", "1 - EER on held-out people", "learning rate"), strict=True):
        axes.plot(epochs, values, marker=".")
        axes.set(title=title, xlabel="epoch", yscale="log" if values is rates else "linear")
    save_figure(figure, file)
