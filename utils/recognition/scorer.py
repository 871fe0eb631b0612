"""The recogniser that scores: its embeddings of faces, kept on disk, and real faces to compare with."""
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import places
from utils.evaluation import variety
from utils.faces.aligned import alignment_setting, read_kept
from utils.faces.folders import image_folders, listing
from utils.recognition.embedding import embed
from utils.runtime.errors import UserError
from utils.runtime.files import read_npz, write_npz
from utils.runtime.records import Record


@dataclass(frozen=True)
class Scorer:
    """The recogniser that scores, and what is made by it."""

    backbone: torch.nn.Module
    digest: str
    device: torch.device

    def decides(self, faces: Mapping[str, Sequence[Path]], template: str) -> dict[str, str]:
        """What decides the embeddings of aligned faces."""
        return {"scores.recogniser": self.digest, "template": template, "faces": listing(faces)}

    def embeddings(self, faces: Mapping[str, Sequence[Path]], decides: Mapping[str, str], file: Path) -> np.ndarray:
        """[N, D] float32 of the faces in their order; those in the file are read where they are of the same faces."""
        with Record(file.with_suffix(".json"), decides, target=file).making() as is_new:
            if not is_new:
                return read_npz(file, ("embeddings",))["embeddings"]
            images = [face for images in faces.values() for face in images]
            embeddings = embed(self.backbone, images, self.device, decides["template"])
            write_npz(file, embeddings=embeddings, paths=np.array([f"{face.parent.name}/{face.name}" for face in images]))
            return embeddings


def require_template(backbone: torch.nn.Module, real: Path | str, template: str, generated: Collection[str]) -> None:
    """Raises UserError where real and generated faces lie on two templates, and the recogniser sees the shift between them."""
    other = sorted(set(generated) - {template})
    if other and not getattr(backbone, "on_arcface", False):
        raise UserError(f"{real}: its faces lie on the template {template}, those to compare with on {other[0]}, and the "
                        "recogniser sees the shift; align both with the same align.template, or give another scores.recogniser")


def real_faces(folder: Path, cache: Path, scorer: Scorer, templates: Collection[str]) -> tuple[variety.Halves, str]:
    """Real faces to compare with: those that align.py kept or, without its record, any 112 x 112 ones.

    Args:
        cache: the file of their embeddings.
        templates: of the faces that they are compared with.
    Returns:
        The unit embeddings [M, D] of every other identity, in two halves, and the digest of all.
    Raises:
        UserError: there is no such folder, a face is of another size, there is one identity only, or as require_template.
    """
    if places.alignment_record(folder).is_file():
        faces, template = read_kept(folder), alignment_setting(folder, "template")
    else:
        faces, template = image_folders(folder), "arcface"
    require_template(scorer.backbone, folder, template, templates)
    faces = at_most(faces, 2 * variety.MOST_FACES)
    decides = scorer.decides(faces, template)
    embeddings = scorer.embeddings(faces, decides, cache)
    labels = np.repeat(list(faces), [len(images) for images in faces.values()])
    return variety.halves(embeddings, labels), decides["faces"]


def at_most(faces: Mapping[str, Sequence[Path]], number: int) -> dict[str, list[Path]]:
    """`number` of the faces, evenly spread over the identities; all of them where there are no more."""
    files = [(identity, file) for identity, images in faces.items() for file in images]
    chosen: dict[str, list[Path]] = {}
    for row in variety.spread(len(files), min(number, len(files))):
        chosen.setdefault(files[row][0], []).append(files[row][1])
    return chosen
