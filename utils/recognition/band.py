"""The band filter: faces are kept whose cosine to their identity's context lies between two bounds.

The cosines are those of the recogniser that made the contexts, never of the one that scores: what a recogniser selects it cannot
judge.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import places
from utils.faces.aligned import image_key
from utils.faces.folders import listing
from utils.identities.contexts import normalise
from utils.runtime.errors import UserError
from utils.runtime.files import read_npz, write_csv, write_npz
from utils.runtime.records import Record

FIRST = 500  # images by which it is estimated how many lie in the band

Faces = Mapping[str, Sequence[Path]]  # identity -> its files


@dataclass(frozen=True)
class Band:
    """A band of cosines, and what they are measured by."""

    lowest: float  # cosine of a face that is kept
    highest: float
    contexts: Mapping[str, np.ndarray]  # identity -> [D], unit norm
    embed: Callable[[Sequence[Path]], np.ndarray]  # N files of aligned faces -> embeddings [N, D]
    decides: Mapping[str, Any]  # what decides the cosines beside the faces, for their record

    def outside(self, images: Faces, found: Faces, file: Path, wanted: int) -> dict[Path, str]:
        """The faces that are not kept, and why; says how many images it takes after the first FIRST.

        Args:
            images: the face of every image, whether it was found or not.
            found: the faces there are.
            file: where their cosines are kept, .npz: other bounds take no time.
            wanted: faces of each identity.
        Raises:
            UserError: the recogniser is not the contexts', by the width of its embeddings.
        """
        faces = [face for files in found.values() for face in files]  # in whose order they are kept: it is the listing's
        known, order = set(faces), in_turns(images)
        first, rest = ([face for face in part if face in known] for part in (order[:FIRST], order[FIRST:]))
        record = Record(file.with_suffix(".json"), {**self.decides, "faces in order": listing(found)}, target=file)
        with record.making() as is_new:
            cosines = self.cosines(first) if is_new else dict(zip(faces, read_npz(file, ("cosines",))["cosines"], strict=True))
            inside = sum(self.reason(cosines[face]) is None for face in first)
            print(f"align.band: {estimate(inside, min(FIRST, len(order)), wanted)}")
            if is_new:
                cosines |= self.cosines(rest)
                write_npz(file, cosines=np.array([cosines[face] for face in faces]))
        return {face: reason for face in faces if (reason := self.reason(cosines[face]))}

    def cosines(self, faces: Sequence[Path]) -> dict[Path, float]:
        """Each face's cosine to its identity's context."""
        if not faces:
            return {}
        contexts, embeddings = np.stack([self.contexts[face.parent.name] for face in faces]), self.embed(faces)
        if embeddings.shape != contexts.shape:
            raise UserError(f"contexts.recogniser: its embeddings are {embeddings.shape[1]} wide, the contexts are "
                            f"{contexts.shape[1]}; give the recogniser that the contexts are of, or turn align.band off")
        return dict(zip(faces, np.vecdot(normalise(embeddings), contexts, dtype=np.float64), strict=True))

    def reason(self, cosine: float) -> str | None:
        """Why a face is not kept; None: it is."""
        if self.lowest <= cosine <= self.highest:
            return None
        return f"cosine {cosine:.4f} is " + (f"above {self.highest:g}" if cosine > self.highest else f"below {self.lowest:g}")


def faces_in_band(band: Band | None, aligned: Path, every: Faces, faces: Faces, keep_images: int) -> Faces:
    """The faces that lie in the band, if there is one; the others are listed. `every`: that of every image, found or not."""
    found, file = sum(map(len, faces.values())), places.outside_band(aligned)
    file.unlink(missing_ok=True)  # of another band
    if band is None:
        return faces
    outside = band.outside(every, faces, places.cosines(aligned), keep_images or -(-found // len(faces)))
    write_csv(file, ("identity", "image", "reason"), sorted((*image_key(face), reason) for face, reason in outside.items()))
    above = sum(" above " in reason for reason in outside.values())
    print(f"{file}: {len(outside)} of {found} faces lie outside the band, {len(outside) - above} below and {above} above")
    return {identity: [face for face in files if face not in outside] for identity, files in faces.items()}


def in_turns(folders: Faces) -> list[Path]:
    """The first file of every identity, then the second of every one, and so on: the first few are of many identities."""
    lists = list(folders.values())
    return [lists[i][k] for k, i in sorted((k, i) for i, files in enumerate(lists) for k in range(len(files)))]


def estimate(inside: int, images: int, wanted: int) -> str:
    """How many images of an identity it takes that `wanted` of them lie in the band, on average, by those looked at first."""
    said = f"{inside} of the first {images} images lie in the band ({inside / images:.1%})"
    if not inside:
        return f"{said}; widen it"
    return f"{said}; sample about {math.ceil(wanted * images / inside)} of each identity to keep {wanted} on average"
