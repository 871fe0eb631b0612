"""Whom a generator may be trained on: several folders without test people and whoever resembles them, and who is in it.

Reads   training.faces: several folders; contexts.faces: a test set; contexts.recogniser; <folder>_labels.csv beside one of the
        folders (number, age, sex, ethnicity: UTKFace); scores.overlay: runs whose aligned faces are described too
Writes  <output>/training_set/: leave_out.txt and held_out.txt, for training.leave_out and training.held_out; left_out.csv (who,
        why, similar to whom); training_set.md (the tables)
        <output>/faces/<folders>/: faces and embeddings, cached; failures.csv: images without a face

    python -m experiments.training_set training.faces=data/lfw/lfw-deepfunneled,data/utkface,data/celeba_10k \\
        contexts.faces=data/celeba_180 align.minimum_face=30

Of each folder one person in 25, 2 to 200, is held out, evenly spread: of LFW the people held out when it is trained on alone.
Left out are people of whom an image is similar to the mean embedding of somebody of the test set or held out, and people all of
whose images are cut: more than CUT of the crop lies outside the image. A folder most of whose faces are cut is not trained on,
and is in neither list; its labels serve all the same.
"""
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from config import places
from config.load import load_config
from experiments.memorisation import nearest_of
from models.published import load_backbone
from utils.evaluation import attributes
from utils.faces.aligned import alignment_setting, read_aligned, read_kept
from utils.faces.held_out import held_out
from utils.faces.images import read_image
from utils.faces.template import ARCFACE, warp
from utils.identities.contexts import normalise
from utils.recognition.embedding import embed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import write_csv, write_text
from utils.training import faces as training_faces
from utils.training.faces import TrainingFaces, some

FMR = 3e-5  # of an image and the mean of another person's images, among the people of the test set
CUT = 0.1  # part of a crop
# Who is in it is estimated from the middle of aligned faces alone, rows and columns, whose every pixel 94% of UTKFace's chips
# show: a classifier trained on faces with cut foreheads found 40% women in LFW, of which 23% are, where it saw faces whole.
MIDDLE = (slice(36, 108), slice(20, 92))
DESCRIBED = 5000  # faces of each set at the most


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "align", "training", "scores"))
    ranks, folder = distributed.setup(config.device), places.experiment_folder(config, "training_set")
    recogniser_file = Path(config.contexts.recogniser)
    recogniser = load_backbone(recogniser_file).to(ranks.device)

    def faces_of(roots: Sequence[str]) -> tuple[TrainingFaces, np.ndarray]:
        cache = places.face_cache(config, roots)
        faces = training_faces.prepare(roots, "", False, config.align.minimum_face / 128, cache, ranks)
        return faces, np.array(training_faces.face_contexts(faces, cache, recogniser, recogniser_file, ranks.device))

    tests, test_embeddings = faces_of((config.contexts.faces,))
    threshold, found = similarity_threshold(test_embeddings, tests.labels)
    text = (f"Similar is a cosine of at least {threshold:.3f} by {recogniser_file.stem}: the FMR is {FMR:g} among the "
            f"{len(tests.identities)} people of {Path(config.contexts.faces).name}; {found:.1%} of their images reach it.\n\n")
    faces, embeddings = faces_of(config.training.faces)
    sources = np.array([name.rpartition("/")[0] or Path(config.training.faces[0]).name for name in faces.identities])
    is_cut = are_cut(faces)
    whole = [source for source in dict.fromkeys(sources) if is_cut[sources[faces.labels] == source].mean() < 0.5]
    is_cut |= ~np.isin(sources[faces.labels], whole)
    chosen = np.concatenate([held_out(np.flatnonzero(sources == source), (sources == source).sum(),
                                      training_faces.HELD_OUT_PART, training_faces.MOST_HELD_OUT) for source in whole])
    probes = {f"test set: {name}": test_embeddings[tests.labels == number] for number, name in enumerate(tests.identities)}
    probes |= {faces.identities[number]: embeddings[faces.labels == number] for number in chosen}
    left_out = whom_to_leave_out(faces, embeddings, is_cut, chosen, probes, threshold)

    used = np.setdiff1d(np.arange(len(sources)), [*chosen, *left_out])
    roots = [root for root, source in zip(config.training.faces, dict.fromkeys(sources), strict=True) if source in whole]
    for file, numbers in {"held_out.txt": chosen, "leave_out.txt": left_out}.items():
        names = [faces.identities[number] for number in numbers if sources[number] in whole]
        write_text(folder / file, "".join(f"{name if len(roots) > 1 else name.rpartition('/')[2]}\n" for name in names))
    write_csv(folder / "left_out.csv", ("identity", "reason", "image", "similar_to", "cosine"),
              [(faces.identities[number], *why) for number, why in left_out.items()])

    text += table_of_counts(faces, sources, chosen, left_out, used)
    if labels := labels_beside(config.training.faces):
        def described(items: Sequence, read: Callable[..., np.ndarray]) -> np.ndarray:
            return normalise(embed(recogniser, items, ranks.device, read=lambda item: middle(read(item))))

        def read(row: int) -> np.ndarray:
            return warp(read_image(faces.files[row]), faces.landmarks[row], ARCFACE)

        labelled = some(np.array([row for row, file in enumerate(faces.files) if str(file.with_suffix("")) in labels]), DESCRIBED)
        own = [labels[str(faces.files[row].with_suffix(""))] for row in labelled]
        parts = {source: described(some(np.flatnonzero(np.isin(faces.labels, used[sources[used] == source])), DESCRIBED), read)
                 for source in whole}
        if config.scores.overlay:
            parts |= {os.path.relpath(run, config.paths.output): described(aligned_files(run), read_aligned)
                      for run in places.run_folders(config)}
        text += "\n" + table_of_people(described(labelled, read), own, parts)
    write_text(folder / "training_set.md", text)
    print(f"{text}\n{folder}: leave_out.txt, held_out.txt, left_out.csv, training_set.md; train with "
          f"training.faces={','.join(roots)} training.leave_out={folder / 'leave_out.txt'} "
          f"training.held_out={folder / 'held_out.txt'}")


def similarity_threshold(embeddings: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The cosine that a part FMR of the images have with the mean of another person, and the part that have it with the
    mean of the other images of their own.

    Args:
        embeddings: [N, D], unit norm. labels: [N], 0 .. C - 1, each of at least two.
    """
    sums = np.stack([embeddings[labels == label].sum(axis=0) for label in range(labels.max() + 1)])
    cosines = embeddings @ normalise(sums).T
    own = (embeddings * normalise(sums[labels] - embeddings)).sum(axis=1)
    is_other = labels[:, None] != np.arange(len(sums))
    threshold = float(np.quantile(cosines[is_other], 1 - FMR))
    return threshold, float((own >= threshold).mean())


def whom_to_leave_out(faces: TrainingFaces, embeddings: np.ndarray, is_cut: np.ndarray, chosen: np.ndarray,
                      probes: Mapping[str, np.ndarray], threshold: float) -> dict[int, tuple[str, str, str, str]]:
    """Number of an identity that is not held out -> why it is to be left out, by which image, similar to whom, how much."""
    similarity, nearest = nearest_of(embeddings, normalise(np.stack([rows.mean(axis=0) for rows in probes.values()])))
    names, left_out = list(probes), {}
    order = np.argsort(faces.labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(faces.labels[order])) + 1):
        row = rows[similarity[rows].argmax()]
        if faces.labels[row] in chosen:
            continue
        if is_cut[rows].all():
            left_out[int(faces.labels[row])] = ("cut", faces.files[row].name, "", "")
        elif similarity[row] >= threshold:
            left_out[int(faces.labels[row])] = ("similar", faces.files[row].name, names[nearest[row]], f"{similarity[row]:.3f}")
    return left_out


def are_cut(faces: TrainingFaces) -> np.ndarray:
    """Which faces [N] bool have more than CUT of their crop outside the image."""
    def outside(file: Path, landmarks: np.ndarray) -> float:
        with Image.open(file) as image:  # its size alone is read, as it is upright
            size = (image.height, image.width)[:: -1 if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else 1]
            return training_faces.part_outside(landmarks, *size, training_faces.MARGIN)

    return np.array([outside(*face) for face in zip(faces.files, faces.landmarks, strict=True)]) > CUT


def middle(face: np.ndarray) -> np.ndarray:
    """An aligned face [112, 112, 3] that is black around the MIDDLE."""
    shown = np.zeros_like(face)
    shown[MIDDLE] = face[MIDDLE]
    return shown


def aligned_files(run: Path) -> list[Path]:
    """Raises UserError where they are not on the unshifted template, on which the MIDDLE lies."""
    aligned = places.aligned(run)
    if alignment_setting(aligned, "template", "run align.py") != "arcface":
        raise UserError(f"{aligned}: its faces are shifted; align them with align.template=arcface")
    return [file for kept in read_kept(aligned).values() for file in kept]


def labels_beside(roots: Sequence[str]) -> dict[str, dict[str, str]]:
    """An image file, without its ending -> its labels, from the <folder>_labels.csv beside a folder."""
    for root, file in ((Path(root), Path(root).with_name(f"{Path(root).name}_labels.csv")) for root in roots):
        if file.is_file():
            with open(file, encoding="utf-8", newline="") as opened:
                rows = list(csv.DictReader(opened))
            if not rows or set(rows[0]) != {"number", "age", "sex", "ethnicity"}:
                raise UserError(f"{file}: its columns are not number, age, sex, ethnicity; correct or remove it")
            return {str(root / row["number"]): {"sex": row["sex"], "age": attributes.age_group(int(row["age"])),
                                    "ethnicity": row["ethnicity"]} for row in rows}
    return {}


def table_of_counts(faces: TrainingFaces, sources: np.ndarray, chosen: np.ndarray, left_out: Mapping[int, tuple],
                    used: np.ndarray) -> str:
    """Markdown: of each folder how many people and images are there, held out, left out and trained on."""
    lines = ["| folder | faces found | people | held out | similar, left out | cut, left out | to train on: people | images |",
             "|---|---|---|---|---|---|---|---|"]
    of_face = sources[faces.labels]
    for source in dict.fromkeys(sources):
        reasons = [why[0] for number, why in left_out.items() if sources[number] == source]
        own = used[sources[used] == source]
        numbers = ((of_face == source).sum(), (sources == source).sum(), (sources[chosen] == source).sum(),
                   reasons.count("similar"), reasons.count("cut"), len(own), np.isin(faces.labels, own).sum())
        lines.append(f"| {source} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def table_of_people(embeddings: np.ndarray, labels: Sequence[Mapping[str, str]], parts: Mapping[str, np.ndarray]) -> str:
    """Markdown: the estimated composition of sets of embeddings, by classifiers fitted to labelled ones, and how well they do."""
    fitted = attributes.fit(embeddings, {name: [face[name] for face in labels] for name in labels[0]})
    lines = ["| | labelled | " + " | ".join(f"{name} (estimated)" for name in parts) + " | accuracy | always the commonest |",
             "|---|" + "---|" * (len(parts) + 3)]
    for attribute in fitted:
        estimates = [attributes.shares(attribute, part) for part in parts.values()]
        for value in attribute.classifier.classes_:
            labelled = np.mean([face[attribute.name] == value for face in labels])
            cells = [f"{share:.1%}" for share in (labelled, *(estimate[value] for estimate in estimates),
                                                  attribute.accuracy, attribute.majority)]
            lines.append(f"| {attribute.name}: {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
