"""The recogniser that scores the demo: a MobileFaceNet that learns to give another recogniser's embeddings.

Reads   training.faces, scores.recogniser: the teacher, which is not to be the one that makes the contexts
Writes  <output>/training/<name>/recogniser.safetensors, recogniser.csv
        <output>/faces/<folder>/: faces and the teacher's embeddings, cached

    python -m experiments.demo_recogniser scores.recogniser=data/mobilefacenet_independent.ncnn.param

No label is used: the loss is 1 - cosine between the embedding of a face and the teacher's (arXiv 1503.02531 of features).
People set apart from the training of the generator are set apart here too, and measured.
"""
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from config.load import load_config
from models.backbones import MobileFaceNet
from models.published import load_backbone
from utils.evaluation import scores
from utils.faces.folders import SIZE
from utils.recognition.augmentation import normalise
from utils.recognition.recogniser_training import faces as training_faces
from utils.recognition.recogniser_training import read_lines
from utils.runtime import files as runs
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.training.loop import Budget, Draws, batch_rows, check_finite, flat_then_cosine, held_out

MINUTES, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 20.0, 64, 3e-3, 0.05
JITTER = 3  # px: the canvas lies so much off, as a detector would put it
BLURRED, LOWEST = 0.7, 40  # part of the faces that are seen at a lower resolution, down to so many px
REPORT_SECONDS = 60
LOG_COLUMNS = ("step", "minutes", "loss", "cosine", "fdr", "eer")


def main() -> None:
    config = load_config(__doc__)
    training, teacher_file = config.training, config.scores.recogniser
    if not teacher_file:
        raise UserError("scores.recogniser: is empty; give the weights of the recogniser to learn from")
    folder, cache, ranks = runs.training_folder(config), runs.face_cache(config), distributed.setup(config.device)
    device, file = ranks.device, folder / "recogniser.safetensors"
    if ranks.world_size > 1:
        raise UserError("torchrun: this small network trains in one process; start it by python -m experiments.demo_recogniser")
    if file.is_file():
        print(f"{file}: exists; set another training.name for a new one")
        return
    teacher = load_backbone(teacher_file).to(device)
    leave_out = read_lines(training.leave_out, "training.leave_out", "give one name a line") if training.leave_out else ()
    faces, crops, wanted = training_faces.prepare(
        training.faces, leave_out, False, config.align.minimum_face / 128, SIZE + 2 * JITTER, JITTER, teacher,
        Path(teacher_file), cache, ranks)
    is_held_out, _ = held_out(faces.labels, len(faces.identities), training.held_out_identities)
    rows, tests = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    torch.manual_seed(training.seed)
    student = MobileFaceNet(wanted.shape[1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    bf16 = distributed.use_bf16(training.precision, device)

    def images_of(numbers: np.ndarray) -> torch.Tensor:
        return normalise(torch.from_numpy(crops[numbers]).to(device).permute(0, 3, 1, 2))

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        draws = Draws(training.seed, step, BATCH_SIZE, ranks)
        numbers = rows[batch_rows(len(rows), BATCH_SIZE, training.seed, step, ranks)]
        top, left = (int(draws.integers(2 * JITTER + 1)[0]) for _ in range(2))
        images = images_of(numbers)[..., top : top + SIZE, left : left + SIZE]
        images = torch.where((draws.uniform() < 0.5)[:, None, None, None], images.flip(3), images)
        low = LOWEST + int(draws.integers(SIZE - LOWEST)[0])
        blurred = F.interpolate(F.interpolate(images, (low, low), mode="bilinear", antialias=True), (SIZE, SIZE),
                                mode="bilinear")
        images = torch.where((draws.uniform() < BLURRED)[:, None, None, None], blurred, images)
        brighter, contrast = ((draws.uniform() - 0.5)[:, None, None, None] for _ in range(2))
        images = (images * (1 + 0.4 * contrast) + 0.4 * brighter).clamp(-1, 1)
        return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(wanted[numbers]).to(device)

    def loss_of(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return (1 - F.cosine_similarity(student(images).float(), targets)).mean()

    def embeddings_of(numbers: np.ndarray) -> torch.Tensor:
        middle = slice(JITTER, JITTER + SIZE)
        with torch.no_grad():
            return torch.cat([student.eval()(images_of(part)[..., middle, middle].contiguous(
                memory_format=torch.channels_last)).float() for part in np.array_split(numbers, len(numbers) // 64 + 1)])

    def validate() -> tuple[float, float, float]:
        """The mean cosine with the teacher, and the FDR and EER of people that were not trained on."""
        embeddings = embeddings_of(tests).cpu()
        cosine = F.cosine_similarity(embeddings, torch.from_numpy(wanted[tests])).mean().item()
        found = scores.metrics(scores.score_distributions(embeddings.numpy(), faces.labels[tests], torch.device("cpu")))
        return cosine, found["fdr"], found["eer"]

    step_loss = distributed.compiled(loss_of, device, "training.compile") if training.compile else loss_of
    of_teacher = scores.metrics(scores.score_distributions(np.array(wanted[tests]), faces.labels[tests],
                                                           torch.device("cpu")))
    print(f"the teacher, on {len(tests)} images of held-out people: FDR {of_teacher['fdr']:.2f}, "
          f"EER {of_teacher['eer']:.4f}")
    budget, log, total, reported_step = Budget(MINUTES, 0, ranks), [], 0.0, 0
    begin = reported = time.monotonic()
    bar = tqdm(total=100, unit="%", desc="train the recogniser",
               bar_format="{desc}: {n:.1f}% |{bar}| {elapsed}<{remaining}{postfix}")
    is_over = False
    while not is_over:
        student.train()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * flat_then_cosine(budget.progress)
        loss = step_loss(*batch_of(budget.step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step += 1
        if budget.step == 1 and training.compile:
            budget.exclude(begin)  # the first step compiles
        total += loss.item()
        is_over = not budget.go_on()
        bar.update(100 * budget.progress - bar.n)
        if is_over or time.monotonic() - reported > REPORT_SECONDS:
            mean = total / (budget.step - reported_step)
            check_finite(mean, loss.detach(), file, budget.step, "LEARNING_RATE")
            log.append((budget.step, budget.seconds / 60, mean, *validate()))
            runs.write_csv(folder / "recogniser.csv", LOG_COLUMNS, log)
            bar.set_postfix_str(" loss {2:.3f}, held-out people: cosine {3:.3f}, FDR {4:.2f}, EER {5:.4f}".format(*log[-1]))
            total, reported, reported_step = 0.0, time.monotonic(), budget.step
    bar.close()
    runs.write_safetensors(file, student.state_dict())
    print(f"{file}: {budget.step} steps; held-out people: cosine with the teacher "
          "{3:.3f}, FDR {4:.2f}, EER {5:.4f}".format(*log[-1]))


if __name__ == "__main__":
    run_script(main)
