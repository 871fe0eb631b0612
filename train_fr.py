"""Stage 6: train a recogniser on aligned faces, steered by people set apart from the training, never by a benchmark.

Reads   the faces kept in <run>/aligned/ (stage 4), or the folder of identity folders fr.images
Writes  <run>/fr/<name>/: backbone.safetensors and <step>backbone.pth (best on the held-out people), log.csv,
        curves.png, held_out.json, run.json, state.pt to continue from; with fr.is_original_train also
        probabilities.npy, dynunc_scores.npz and keep_<fraction>.txt

    python train_fr.py
    torchrun --nproc_per_node=4 train_fr.py --preset paper_casia fr.is_original_train=true
    python train_fr.py fr.name=half fr.keep_list=output/<run>/fr/cosface-iresnet50/keep_0.5.txt

Running the same command again continues where the last state was saved.
"""
import time
from dataclasses import asdict

import numpy as np
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau
from tqdm import tqdm

from config.load import load_config
from models import backbones, margin_heads
from utils.faces import folders as face_images
from utils.faces.template import read_kept
from utils.recognition import recogniser_training as training
from utils.recognition.augmentation import augment, normalise
from utils.runtime import files as runs
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script

HEADS = {"cosface": margin_heads.CosFace, "arcface": margin_heads.ArcFace, "adaface": margin_heads.AdaFace}
CHECK_STEPS = 20  # the loss is fetched from the device, shown and checked so often
SAVE_SECONDS = 300  # the state is saved after each epoch, and so often within one
KEEP_LIST_MEND = "run train_fr.py with fr.is_original_train=true, which writes keep-lists"
LOG_COLUMNS = ("epoch", "loss", "held_out_accuracy", "learning_rate", "images_per_second")
# What may differ when a training is continued: it does not change the curve, or extends it.
FREE_TO_CHANGE = ("epochs", "early_stop", "precision", "compile", "dynunc_window", "keep_fractions", "name", "images",
                  "leave_out", "batch_size")


def main() -> None:
    config = load_config(__doc__)
    ranks = distributed.setup(config.device)
    fr, folder = config.fr, runs.fr_folder(config)
    total_batch = fr.batch_size * ranks.world_size
    if fr.is_original_train and fr.dynunc_window > fr.epochs:
        raise UserError(f"fr.dynunc_window: {fr.dynunc_window} is more than fr.epochs={fr.epochs}; lower it to "
                        f"{fr.epochs} or raise fr.epochs")

    # the images: packed once, then chosen by row
    leave_out = training.read_lines(fr.leave_out, "fr.leave_out", "give one name a line") if fr.leave_out else ()
    faces = face_images.identity_folders(fr.images) if fr.images else read_kept(runs.aligned_folder(config))
    chosen = face_images.select(faces, fr.identities, fr.images_per_identity, fr.minimum_images, leave_out)
    packed_file = folder.parent / f"faces-{fr.identities or 'all'}x{fr.images_per_identity or 'all'}.npy"
    if ranks.is_main:
        face_images.pack(chosen, packed_file)
    ranks.barrier()
    packed = face_images.load_packed(packed_file)
    keep = training.read_lines(fr.keep_list, "fr.keep_list", KEEP_LIST_MEND) if fr.keep_list else None
    data = training.training_set(packed, fr.held_out_identities, keep)
    if data.empty_identities:
        ranks.print(f"{len(data.empty_identities)} identities have no image in {fr.keep_list} and are left out, "
                    f"the first is {data.empty_identities[0]}")
    reader = face_images.FaceReader(packed.images, ranks.device)
    labels = torch.from_numpy(data.labels).to(ranks.device)

    # backbone, head, optimiser, schedule
    torch.manual_seed(fr.seed)
    if fr.backbone == "mobilefacenet":
        backbone = backbones.MobileFaceNet(fr.embedding_size)
    else:
        backbone = getattr(backbones, fr.backbone)(fr.embedding_size, fr.dropout)
    head = HEADS[fr.head](fr.embedding_size, data.num_classes, s=fr.scale, m=fr.margin)
    bf16 = distributed.use_bf16(fr.precision, ranks.device)
    trainer = training.Trainer(backbone, head, ranks, fr.learning_rate * total_batch / 512, fr.momentum,
                               fr.weight_decay, fr.gradient_clip, bf16, fr.compile)
    if fr.schedule == "plateau":
        scheduler = ReduceLROnPlateau(trainer.optimizer, "max", 0.1, fr.patience, threshold=0)
    else:
        scheduler = MultiStepLR(trainer.optimizer, fr.milestones, 0.1)

    # the run's record, and the state to continue from
    if ranks.is_main:
        decides = {name: value for name, value in asdict(fr).items() if name not in FREE_TO_CHANGE} | {
            "images": packed.listing, "keep_list": runs.file_digest(fr.keep_list) if fr.keep_list else None,
            "batch on all devices": total_batch}
        runs.claim_run(folder / "run.json", decides, {"config": asdict(config)})
        runs.write_json(folder / "held_out.json", data.held_out_identities)
        if fr.is_original_train:
            probabilities = training.open_probabilities(folder / "probabilities.npy", fr.epochs, len(data.rows))
    ranks.barrier()
    # where the training stands; epoch and step count what is done
    progress = {"epoch": 0, "step": 0, "steps_in_all": 0, "best": -1.0, "best_epoch": 0, "best_step": 0, "log": []}
    # what an epoch gathers: loss and steps summed; each image's probability of its class
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    probability = torch.zeros(len(data.rows), device=ranks.device)
    gradient_norms = torch.zeros((), device=ranks.device)
    state_file = folder / "state.pt"
    if state_file.is_file():
        state = training.read_state(state_file, ranks.device)
        progress = state["progress"]
        trainer.load_state_dict(state["trainer"])
        scheduler.load_state_dict(state["scheduler"])
        if ranks.is_main:  # the gathered sums are whole there; the other ranks add to them
            sums, probability = state["sums"], state["probability"]
        ranks.print(f"continues after epoch {progress['epoch']}, step {progress['step']}")

    def save() -> None:
        training.gather(ranks, sums, probability)
        if ranks.is_main:
            runs.write_torch(state_file, {
                "progress": progress, "trainer": trainer.state_dict(), "scheduler": scheduler.state_dict(),
                "sums": sums, "probability": probability})

    def check_finite() -> None:
        if not torch.isfinite(gradient_norms):  # the same on every rank, so that all of them stop here
            raise UserError(f"{folder}: the loss or its gradient is not finite any more at epoch "
                            f"{progress['epoch'] + 1}, step {progress['step']}; state.pt is from before: run again "
                            "with fr.precision=fp32, or begin with a lower fr.learning_rate under another fr.name")

    def is_over() -> bool:
        waited = progress["epoch"] - progress["best_epoch"]
        return progress["epoch"] >= fr.epochs or (fr.schedule == "plateau" and waited >= fr.early_stop)

    if not state_file.is_file():
        save()
    saved = time.monotonic()
    while not is_over():
        epoch, first_step = progress["epoch"], progress["step"]
        order, dropped = training.epoch_order(len(data.rows), total_batch, fr.seed, epoch)
        mine = order[first_step:, ranks.rank * fr.batch_size:(ranks.rank + 1) * fr.batch_size]
        trainer.train()
        begin = time.perf_counter()
        with tqdm(total=order.size, initial=first_step * total_batch, unit="image", disable=not ranks.is_main,
                  desc=f"epoch {epoch + 1} of {fr.epochs}") as bar:
            batches = zip(mine, reader.batches(data.rows[mine]), strict=True)
            for step, (numbers, faces) in enumerate(batches, first_step):
                training.seed_step(fr.seed, epoch, step, ranks.rank)
                numbers = torch.from_numpy(numbers)
                faces = normalise(augment(faces, numbers, fr.seed, epoch, fr.augmentation))
                numbers = numbers.to(ranks.device, non_blocking=True)
                loss, norm, p = trainer.step(faces, labels[numbers], fr.is_original_train)
                sums += torch.stack([loss, torch.ones_like(loss)])
                gradient_norms += norm
                if fr.is_original_train:
                    probability[numbers] = p
                progress["step"] += 1
                bar.update(total_batch)
                if progress["step"] % CHECK_STEPS == 0:
                    check_finite()
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                    if ranks.agree(time.monotonic() - saved > SAVE_SECONDS):
                        save()
                        saved = time.monotonic()
        check_finite()
        training.gather(ranks, sums, probability)
        images_per_second = (order.size - first_step * total_batch) / (time.perf_counter() - begin)

        # steer by the held-out people
        accuracy = 0.0
        if ranks.is_main:
            accuracy = training.verification_accuracy(backbone, packed.images, data.held_out_rows,
                                                      data.held_out_labels, ranks.device, bf16)
        [accuracy] = ranks.sum([accuracy])
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step(*([accuracy] if fr.schedule == "plateau" else []))
        progress["epoch"], progress["step"] = epoch + 1, 0
        progress["steps_in_all"] += len(order)
        if accuracy > progress["best"]:
            progress |= {"best": accuracy, "best_epoch": epoch + 1, "best_step": progress["steps_in_all"]}
            if ranks.is_main:
                runs.write_safetensors(folder / "backbone.safetensors", backbone.state_dict())
        if ranks.is_main:
            loss = (sums[0] / sums[1]).item()
            progress["log"].append((epoch + 1, loss, accuracy, learning_rate, images_per_second))
            if fr.is_original_train:
                probabilities[epoch] = probability.cpu()
                probabilities[epoch, dropped] = np.nan
                probabilities.flush()
            print("epoch {}: loss {:.4f}, held-out accuracy {:.4f}, learning rate {:g}".format(*progress["log"][-1]))
        sums.zero_()
        probability.zero_()
        save()
        saved = time.monotonic()
        if ranks.is_main:
            runs.write_csv(folder / "log.csv", LOG_COLUMNS, progress["log"])
            training.plot_curves(progress["log"], folder / "curves.png")

    if ranks.is_main:
        runs.write_torch(folder / f"{progress['best_step']}backbone.pth", load_file(folder / "backbone.safetensors"))
        print(f"trained on {len(data.rows)} images of {data.num_classes} people; best of {progress['epoch']} epochs is "
              f"{progress['best_epoch']}: accuracy {progress['best']:.4f} on "
              f"{len(data.held_out_identities)} held-out people; {folder / 'backbone.safetensors'}")
        if fr.is_original_train:
            files = training.write_dynunc(folder, probabilities[:progress["epoch"]], packed.paths[data.rows],
                                          fr.dynunc_window, fr.keep_fractions)
            print(f"keep-lists: {', '.join(map(str, files))}; train on one with fr.keep_list=<file> fr.name=<name>")
    ranks.close()


if __name__ == "__main__":
    run_script(main)
