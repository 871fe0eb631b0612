"""Stage 6: train a recogniser on aligned faces, steered by held-out people, never by a benchmark.

Reads   the faces kept in <run>/aligned/ (stage 4), or the folder of identity folders fr.images
Writes  <run>/fr/<name>/: backbone.safetensors and <step>backbone.pth (best on the held-out people), log.csv,
        curves.png, held_out.json, run.json, state.pt to continue from; with fr.is_original_train also
        probabilities.npy, dynunc_scores.npz and keep_<fraction>.txt

    python train_fr.py
    torchrun --nproc_per_node=4 train_fr.py --preset paper_casia fr.is_original_train=true
    python train_fr.py fr.name=half fr.keep_list=output/<run>/fr/cosface-iresnet50/keep_0.5.txt

Running the same command again continues where the last state was saved.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau

from config import places
from config.config import FR, Config
from config.load import load_config
from models.backbones import BACKBONES
from models.margin_heads import HEADS
from utils.faces import folders, packed
from utils.faces.aligned import read_kept
from utils.recognition.augmentation import normalise
from utils.recognition.dynunc import open_probabilities, write_dynunc, write_epoch
from utils.recognition.recogniser_training import (
    RecogniserLoss,
    TrainingSet,
    augmented,
    epoch_order,
    plot_curves,
    verification_accuracy,
)
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import file_digest, read_names, require_file, write_json, write_safetensors, write_torch
from utils.runtime.foreign_arrays import reading
from utils.runtime.records import Record
from utils.training.loop import Budget, Training

DROPOUT, MOMENTUM, WEIGHT_DECAY, GRADIENT_CLIP = 0.4, 0.9, 5e-4, 5.0  # the paper's
PATIENCE, EARLY_STOP = 4, 6  # epochs without a better score: at one more the learning rate falls to a tenth; training ends


def main() -> None:
    config = load_config(__doc__, reads=("paths", "fr", "training"), choices={"fr.backbone": BACKBONES, "fr.head": HEADS})
    ranks = distributed.setup(config.device)
    fr, folder, total_batch = config.fr, places.fr_folder(config), config.fr.batch_size * ranks.world_size

    # the images: packed once, then chosen by row
    images, data, listing = packed_faces(config, ranks)
    reader = packed.FaceReader(images.images, ranks.device)
    labels = torch.from_numpy(data.labels).to(ranks.device)
    steps = len(epoch_order(len(data.rows), total_batch, fr.seed, 0)[0])  # an epoch

    # backbone, head, loss, optimiser, schedule
    torch.manual_seed(fr.seed)
    backbone = BACKBONES[fr.backbone](DROPOUT).to(ranks.device, memory_format=torch.channels_last)
    head = HEADS[fr.head](backbone.num_features, data.num_classes, s=fr.scale, m=fr.margin).to(ranks.device)
    probability = torch.zeros(len(data.rows), device=ranks.device) if fr.is_original_train else None
    bf16 = distributed.use_bf16(config.training.precision, ranks.device)
    compiled = partial(distributed.compiled, device=ranks.device) if config.training.compile else lambda network: network
    loss = RecogniserLoss(backbone, head, bf16, compiled, probability)
    weights = [weight for weight in (*backbone.parameters(), *head.parameters()) if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, fr.learning_rate * total_batch / 512, MOMENTUM, weight_decay=WEIGHT_DECAY)
    scheduler = MultiStepLR(optimizer, fr.milestones, 0.1) if fr.milestones else \
        ReduceLROnPlateau(optimizer, "max", 0.1, PATIENCE, threshold=0)

    # the run's record, and the state to continue from
    record = Record(folder / "run.json", decides(fr, listing, total_batch), "fr.name", contents=folder / "state.pt", may_change={
        "fr.epochs": fr.epochs, "training.precision": "bf16" if bf16 else "fp32"})
    ranks.on_main(lambda: record.begin(config=asdict(config)))
    ranks.on_main(lambda: write_json(folder / "held_out.json", data.held_out_identities))
    training = Training("train the recogniser", folder / "state.pt", folder / "log.csv", ranks, Budget(steps=fr.epochs * steps),
                        optimizer, {"backbone": backbone, "head": head}, clip=[(backbone, GRADIENT_CLIP), (head, GRADIENT_CLIP)],
                        images=total_batch, seed=fr.seed, rows=fr.epochs, early_stop=0 if fr.milestones else EARLY_STOP,
                        summed={"probability": probability} if fr.is_original_train else {}, scheduler=scheduler,
                        steps_at_validations=True, fix="begin with a lower fr.learning_rate under another fr.name")
    training.restore()
    if fr.is_original_train and ranks.is_main:
        probabilities = open_probabilities(folder / "probabilities.npy", fr.epochs, len(data.rows), training.step // steps)

    def batches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Faces, classes and numbers of the images; this rank's share of each step."""
        epoch, first = divmod(step, steps)
        while True:
            loss.train()
            order, _ = epoch_order(len(data.rows), total_batch, fr.seed, epoch)
            mine = order[first:, ranks.rank * fr.batch_size : (ranks.rank + 1) * fr.batch_size]
            for shown, numbers in augmented(reader, data.rows, mine, epoch, fr.seed, fr.augmentation):
                yield normalise(shown), labels[numbers], numbers
            epoch, first = epoch + 1, 0

    def validate() -> dict[str, float]:
        epoch = training.step // steps
        plot_curves(training.log, folder / "curves.png")
        if fr.is_original_train:
            write_epoch(probabilities, epoch - 1, probability, epoch_order(len(data.rows), total_batch, fr.seed, epoch - 1)[1])
        accuracy = verification_accuracy(backbone, images.images, data.held_out_rows, data.held_out_labels, ranks.device, bf16)
        return {"epoch": epoch, "held_out_accuracy": accuracy, "score": accuracy}

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # every batch has the same shape
        training.run(batches, loss, validate, fr.epochs,
                     keep=lambda: write_safetensors(folder / "backbone.safetensors", backbone.state_dict()))
    if ranks.is_main:
        publish(folder, training, steps, data)
    if fr.is_original_train and ranks.is_main:
        files = write_dynunc(folder, probabilities[: training.step // steps], images.paths[data.rows])
        print(f"keep-lists: {', '.join(map(str, files))}; train on one with fr.keep_list=<file> fr.name=<name>")
    ranks.close()


def packed_faces(config: Config, ranks: distributed.Ranks) -> tuple[packed.PackedFaces, TrainingSet, str]:
    """All faces as one array, those to train on and to hold out, and the digest of all. Raises UserError where none are left."""
    fr = config.fr
    faces = folders.identity_folders(fr.images) if fr.images else read_kept(places.aligned(places.run_folder(config)))
    leave_out = read_names(fr.leave_out, "fr.leave_out", faces) if fr.leave_out else ()
    chosen = folders.select(faces, fr.identities, fr.images_per_identity, fr.minimum_images, leave_out)
    listing = ranks.from_main(lambda: folders.listing(chosen))
    file = places.packed_faces(config, listing)
    ranks.on_main(lambda: packed.pack(chosen, file, listing))
    images = packed.load_packed(file)
    keep_list = read_names(fr.keep_list, "fr.keep_list", images.paths.tolist()) if fr.keep_list else None
    data = TrainingSet.choose(images, keep_list)
    if keep_list is not None and not len(data.rows):
        raise UserError(f"{fr.keep_list}: names no image to train on (fr.keep_list); give a keep-list of these faces")
    if data.empty_identities:
        ranks.print(f"{len(data.empty_identities)} identities have no image in {fr.keep_list} and are left out, "
                    f"the first is {data.empty_identities[0]}")
    return images, data, listing


def decides(fr: FR, listing: str, total_batch: int) -> dict[str, Any]:
    """What decides the training run, for its record."""
    return {f"fr.{name}": getattr(fr, name) for name in (
        "identities", "images_per_identity", "minimum_images", "backbone", "head", "scale", "margin", "augmentation",
        "learning_rate", "milestones", "seed", "is_original_train")} | {
        "images": listing, "fr.keep_list": file_digest(fr.keep_list) if fr.keep_list else None,
        "images per step on all devices": total_batch}


def publish(folder: Path, training: Training, steps: int, data: TrainingSet) -> None:
    """The curves, the best weights under the published name too, and what came out; `steps`: of an epoch."""
    plot_curves(training.log, folder / "curves.png")
    fix = "put it back, or begin under another fr.name"
    best = require_file(folder / "backbone.safetensors", "the best weights of this training run", fix)
    with reading(best, "the weights that this training run has kept", fix):
        write_torch(folder / f"{training.best_step}backbone.pth", load_file(best))
    print(f"trained on {len(data.rows)} images of {data.num_classes} people; best of {training.step // steps} epochs is "
          f"{training.best_step // steps}: accuracy {training.best:.4f} on {len(data.held_out_identities)} held-out people; "
          f"{best}")


if __name__ == "__main__":
    run_script(main)
