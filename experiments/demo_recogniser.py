"""The recogniser that scores the demo: a MobileFaceNet that learns to give another recogniser's embeddings.

Reads   training.faces, scores.recogniser: the teacher, which is not to be the one that makes the contexts
Writes  <output>/training/<name>/recogniser.safetensors, recogniser.csv
        <output>/faces/<folder>/: faces and the teacher's embeddings, cached

    python -m experiments.demo_recogniser training.length=20min \\
        scores.recogniser=data/mobilefacenet_independent.ncnn.param

No label is used: the loss is 1 - cosine between the embedding of a face and the teacher's (arXiv 1503.02531 of features).
People held out from the training of the generator are held out here too, and measured.
"""
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from config import places
from config.load import load_config
from models.backbones import MobileFaceNet
from models.published import load_backbone
from utils.evaluation.scores import metrics, score_distributions
from utils.faces.template import SIZE
from utils.recognition.augmentation import network_input
from utils.runtime import ranks as distributed
from utils.runtime.errors import run_script
from utils.runtime.files import write_safetensors
from utils.training import faces as training_faces
from utils.training.draws import Draws, drawn_batches
from utils.training.loop import Budget, Training

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, VALIDATIONS = 64, 3e-3, 0.05, 20
JITTER = 3  # px: the canvas lies so much off, as a detector would put it
BLURRED, LOWEST = 0.7, 40  # part of the faces that are seen at a lower resolution, and the lowest in px


class Imitation(nn.Module):
    """1 - cosine between the student's embeddings and the teacher's."""

    def __init__(self, student: MobileFaceNet, bf16: bool) -> None:
        super().__init__()
        self.student, self.bf16 = student, bf16

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return (1 - F.cosine_similarity(self.student(images).float(), targets)).mean()


def main() -> None:
    config = load_config(__doc__, reads=("paths", "scores", "align", "training"))
    settings, teacher_file = config.training, Path(config.scores.recogniser)
    folder, cache, ranks = places.training_folder(config), places.face_cache(config), distributed.setup(config.device)
    device, file = ranks.device, folder / "recogniser.safetensors"
    if file.is_file():
        print(f"{file}: exists; set another training.name for a new one")
        return
    teacher = load_backbone(teacher_file).to(device)
    faces = training_faces.prepare(settings.faces, settings.leave_out, False, config.align.minimum_face / 128, cache, ranks)
    crops = ranks.main_first(lambda: training_faces.crops(faces, cache, SIZE + 2 * JITTER, JITTER))
    wanted = ranks.main_first(lambda: training_faces.face_contexts(faces, cache, teacher, teacher_file, device))
    rows, tests, _ = training_faces.hold_out(faces, settings.held_out)

    torch.manual_seed(settings.seed)
    student = MobileFaceNet(wanted.shape[1]).to(device, memory_format=torch.channels_last)
    loss = Imitation(student, distributed.use_bf16(settings.precision, device))
    if settings.compile:
        loss.student = distributed.compiled(student, device)
    training = Training("recogniser", folder / "recogniser_state.pt", folder / "recogniser.csv", ranks,
                        Budget.parse(settings.length),
                        torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY), {"student": student},
                        clip=[(student, 5.0)], images=BATCH_SIZE, seed=settings.seed)
    training.restore()

    def images_of(numbers: np.ndarray) -> torch.Tensor:
        return network_input(crops[numbers], device)

    def batch(draws: Draws, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        student.train()
        top, left, low = (int(draws.integers(high)[0]) for high in (2 * JITTER + 1, 2 * JITTER + 1, SIZE - LOWEST))
        images = images_of(rows[numbers])[..., top : top + SIZE, left : left + SIZE]
        images = torch.where((draws.uniform() < 0.5)[:, None, None, None], images.flip(3), images)
        blurred = F.interpolate(F.interpolate(images, (LOWEST + low, LOWEST + low), mode="bilinear", antialias=True),
                                (SIZE, SIZE), mode="bilinear")
        images = torch.where((draws.uniform() < BLURRED)[:, None, None, None], blurred, images)
        brighter, contrast = ((draws.uniform() - 0.5)[:, None, None, None] for _ in range(2))
        images = (images * (1 + 0.4 * contrast) + 0.4 * brighter).clamp(-1, 1)
        return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(wanted[rows[numbers]]).to(device)

    def scores_of(embeddings: np.ndarray) -> dict[str, float]:
        return metrics(score_distributions(embeddings, faces.labels[tests]))

    @torch.no_grad()
    def validate() -> dict[str, float]:
        """The mean cosine with the teacher, and the FDR and EER of people that were not trained on."""
        student.eval()
        middle = slice(JITTER, JITTER + SIZE)
        embeddings = torch.cat([student(images_of(part)[..., middle, middle].contiguous(memory_format=torch.channels_last))
                                for part in np.array_split(tests, len(tests) // 64 + 1)]).float().cpu()
        cosine = F.cosine_similarity(embeddings, torch.from_numpy(wanted[tests])).mean().item()
        found = scores_of(embeddings.numpy())
        return {"cosine": cosine, "fdr": found["fdr"], "eer": found["eer"], "score": cosine}

    of_teacher = scores_of(np.array(wanted[tests]))
    ranks.print(f"the teacher, on {len(tests)} images of held-out people: FDR {of_teacher['fdr']:.2f}, "
                f"EER {of_teacher['eer']:.4f}")
    training.run(drawn_batches(len(rows), BATCH_SIZE, settings.seed, ranks, batch), loss, validate, VALIDATIONS)
    if ranks.is_main:
        write_safetensors(file, student.state_dict())
        print(f"{file}: {training.step} steps; cosine with the teacher on held-out people {training.best:.3f} at best")
    ranks.close()


if __name__ == "__main__":
    run_script(main)
