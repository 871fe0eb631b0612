"""Training a recogniser: its images and their order, its loss, the score on held-out people."""
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from models.margin_heads import MarginHead
from utils.evaluation.scores import metrics, score_distributions
from utils.faces.held_out import held_out
from utils.faces.packed import FaceReader, PackedFaces
from utils.recognition.augmentation import augment
from utils.recognition.embedding import embed
from utils.runtime.errors import UserError
from utils.runtime.figures import save_figure

HELD_OUT_PART, MOST_HELD_OUT = 10, 500  # with the paper's 50 images each, 500 people make 600,000 genuine pairs

# Images augmented together: those with the same operation and magnitude are one call, and on a GPU it is calls that take time.
AUGMENTED, AUGMENTED_ON_CPU = 4096, 1024


@dataclass(frozen=True)
class TrainingSet:
    """The rows of a packed array that are trained on, and those of held-out people, who steer the training."""

    rows: np.ndarray  # [N] int64
    labels: np.ndarray  # [N] int64 in 0 .. num_classes - 1, each class with at least one image
    num_classes: int
    held_out_rows: np.ndarray  # [M] int64
    held_out_labels: np.ndarray  # [M] int64
    held_out_identities: list[str]  # names
    empty_identities: list[str]  # names of those that a keep-list left without an image; they are no classes

    @classmethod
    def choose(cls, packed: PackedFaces, keep: Collection[str] | None) -> "TrainingSet":
        """Hold identities out, evenly spread over those with two images or more, and keep what `keep` names.

        Args:
            keep: `<identity>/<image>` of the images to train on; None: all. It does not change who is held out.
        Raises:
            UserError: too few identities.
        """
        names, count = packed.identities, len(packed.identities)
        with_pairs = np.flatnonzero(np.bincount(packed.labels, minlength=count) >= 2)
        chosen = held_out(with_pairs, count, HELD_OUT_PART, MOST_HELD_OUT)
        is_held_out = np.isin(packed.labels, chosen)
        trained = ~is_held_out & (True if keep is None else np.isin(packed.paths, list(keep)))
        rows = np.flatnonzero(trained)
        classes, labels = np.unique(packed.labels[rows], return_inverse=True)
        held_out_rows = np.flatnonzero(is_held_out)
        empty = np.setdiff1d(np.arange(count), np.concatenate([classes, chosen]))
        return cls(rows, labels, len(classes), held_out_rows, packed.labels[held_out_rows],
                       names[chosen].tolist(), names[empty].tolist())


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
                        "lower it, or give more (fr.keep_list, fr.identities)")
    # In turn, so that no image is left out more often than another: DynUnc needs to see each of them again and again.
    turns = np.random.default_rng(seed).permutation(images)
    dropped = turns[(epoch * spare + np.arange(spare)) % images]
    shown = np.setdiff1d(np.arange(images), dropped)
    return np.random.default_rng((seed, epoch)).permutation(shown).reshape(steps, total_batch), dropped


def augmented(reader: FaceReader, rows: np.ndarray, order: np.ndarray, epoch: int, seed: int, kind: str
              ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of augmented faces, uint8 [B, 3, 112, 112], and the numbers of the images [B], both on the reader's device.

    Args:
        rows: [N], where each image lies among the packed faces.
        order: [batches, B], numbers of images, 0 .. N - 1.
        epoch, seed, kind: as utils.recognition.augmentation.augment takes them.
    """
    together = AUGMENTED_ON_CPU if reader.device.type == "cpu" else AUGMENTED
    batches = max(together // order.shape[1], 1)
    blocks = [order[start : start + batches].ravel() for start in range(0, len(order), batches)]
    for block, faces in zip(blocks, reader.batches(rows[block] for block in blocks), strict=True):
        numbers = torch.from_numpy(block)
        shown = augment(faces, numbers, seed, epoch, kind)
        on_device = numbers.to(reader.device, non_blocking=True)
        yield from zip(shown.split(order.shape[1]), on_device.split(order.shape[1]), strict=True)


class RecogniserLoss(nn.Module):
    """Cross-entropy of a margin head over a backbone (CosFace, arXiv 1801.09414).

    Args:
        compiled: fuses the backbone's operations, or leaves them.
        probability: [N], where each image's probability of its class without the margin is noted; None: nowhere.
    """

    def __init__(self, backbone: nn.Module, head: MarginHead, bf16: bool, compiled: Callable[[nn.Module], nn.Module],
                 probability: torch.Tensor | None) -> None:
        super().__init__()
        self.backbone, self.head, self.bf16, self.probability = compiled(backbone), head, bf16, probability

    def forward(self, faces: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Faces [B, 3, 112, 112] in [-1, 1], their classes [B] and numbers [B] -> the loss, a scalar."""
        with torch.autocast(faces.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.backbone(faces)
            loss = F.cross_entropy(self.head(embeddings, labels), labels)
        if self.probability is not None:
            self.probability[numbers] = self.head.probability(embeddings, labels)
        return loss


def verification_accuracy(backbone: nn.Module, images: np.ndarray, rows: np.ndarray, labels: np.ndarray,
                          device: torch.device, bf16: bool) -> float:
    """1 - EER over all pairs of the faces `rows` [M] of a packed array; the backbone is left in eval mode."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        embeddings = embed(backbone, rows, device, read=images.__getitem__)
    return 1 - metrics(score_distributions(embeddings, labels, device))["eer"]


def plot_curves(log: Sequence[Mapping[str, float]], file: Path) -> None:
    """Loss, held-out accuracy and learning rate over the epochs."""
    figure, epochs = Figure(figsize=(12, 3.5), layout="constrained"), [row["epoch"] for row in log]
    for axes, column, title in zip(figure.subplots(1, 3), ("loss", "held_out_accuracy", "learning_rate"),
                                   ("loss", "1 - EER on held-out people", "learning rate"), strict=True):
        axes.plot(epochs, [row[column] for row in log], marker=".")
        axes.set(title=title, xlabel="epoch", yscale="log" if column == "learning_rate" else "linear")
    save_figure(figure, file)
