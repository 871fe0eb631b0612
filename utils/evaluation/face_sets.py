"""Which faces of which folders verification compares: pairs of a list, or all pairs; and the embeddings of both."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from config import places
from utils.evaluation.verification import mirror_sum, read_lfw_pairs
from utils.faces.aligned import read_aligned, read_list
from utils.faces.folders import identity_folders
from utils.faces.images import IMAGE_SUFFIXES, read_image
from utils.faces.template import TEMPLATES, centre_crop
from utils.runtime.errors import UserError
from utils.runtime.files import read_names
from utils.runtime.records import decided


@dataclass(frozen=True)
class PairList:
    """Pairs of the images of a folder, each `<identity>/<image>`."""

    name: str  # of its column
    folder: Path
    pairs: list[tuple[str, str]]
    same: np.ndarray  # [P] bool

    def names(self) -> set[str]:
        return {name for pair in self.pairs for name in pair}


@dataclass(frozen=True)
class FaceSet:
    """Images of a folder, of which all pairs are scored."""

    name: str
    folder: Path
    faces: Mapping[str, Sequence[str]]  # identity -> its images, each `<identity>/<image>`

    def names(self) -> list[str]:
        return [name for names in self.faces.values() for name in names]


def pair_lists(files: Sequence[str], folders: Sequence[str]) -> list[PairList]:
    """The lists of verify.lfw_pairs, and their folders verify.lfw_faces: one for all of them, or one for each.

    Raises:
        UserError: a folder is missing, or two lists share a name.
    """
    folders = folders * (len(files) if len(folders) == 1 else 1)
    if files and len(folders) != len(files):
        raise UserError(f"verify.lfw_faces: {len(folders)} folders for the pair lists {', '.join(files)}; give one "
                        "for all of them, or one for each")
    lists = {}
    for file, folder in zip(files, map(Path, folders), strict=False):
        pairs, same = read_lfw_pairs(file)
        _, images = alignment(folder)
        is_lfw = any("lfw" in part.lower() for path in (Path(file), folder, images) for part in path.parts[-2:])
        stem = Path(file).stem.removesuffix("_pairs")
        name = "LFW" if is_lfw and "LFW" not in lists else Path(file).absolute().parent.name if stem == "pairs" else stem
        if name in lists:
            raise UserError(f"{file}: another pair list is called {name} too; rename the file")
        lists[name] = PairList(name, folder, pairs, same)
    return list(lists.values())


def face_sets(folders: Sequence[str], lists_of_people: Sequence[str], images_per_identity: int = 0) -> list[FaceSet]:
    """The folders of verify.all_pairs, with the images in which align.py found no face; of the people of verify.people.

    Args:
        images_per_identity: the first images of each identity that are taken; 0: all.
    Raises:
        UserError: there are more lists of people than folders, a folder holds no faces, two images share a name, or a list
            names someone else.
    """
    if len(lists_of_people) > len(folders):
        raise UserError(f"verify.people: {len(lists_of_people)} lists for {len(folders)} folders of verify.all_pairs; "
                        "give one for each folder at most")
    sets = []
    for folder, people in zip_longest(map(Path, folders), lists_of_people):
        files = [file for images in identity_folders(folder).values() for file in images]
        if (failures := folder / "failures.csv").is_file():
            files += [Path(identity, image) for identity, image in read_list(failures, "failures")]
        faces: dict[str, list[str]] = {}
        taken: set[str] = set()
        for file in sorted(files):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                name = f"{file.parent.name}/{file.stem}"
                if name in taken:
                    raise UserError(f"{folder / file}: another image is called {name} too; rename one of them")
                taken.add(name)
                faces.setdefault(file.parent.name, []).append(name)
        if people:
            chosen = read_names(people, "verify.people", faces)
            faces = {name: names for name, names in faces.items() if name in chosen}
        faces = {name: names[: images_per_identity or None] for name, names in faces.items()}
        sets.append(FaceSet(f"{folder} ({people})" if people else str(folder), folder, faces))
    return sets


def alignment(folder: Path, needs_record: bool = True) -> tuple[str, Path]:
    """The template that a folder of faces was aligned to, and the folder of the images that were aligned.

    Without a record the faces are taken to lie on the benchmarks' template, where they may.
    """
    if not needs_record and not places.alignment_record(folder).is_file():
        return "arcface", folder
    record = decided(places.alignment_record(folder), ("align.template", "align.images"),
                     "align LFW by align.py with align.template=arcface, and give its folder aligned/ (verify.lfw_faces)")
    return record["align.template"], Path(record["align.images"]) if record["align.images"] else places.samples(folder.parent)


def embed_folder(folder: Path, names: Iterable[str], embed_both: Callable[..., np.ndarray]
                 ) -> tuple[dict[str, np.ndarray], set[str]]:
    """The embedding of each `<identity>/<image>` of a folder, [D], the sum of the image's and its mirror image's.

    An image without a detected face is cropped at its centre; these come second.

    Args:
        embed_both: utils.recognition.embedding.embed of a backbone, with mirror=True.
    """
    template, images = alignment(folder, needs_record=False)
    names = sorted(names)
    aligned = {name: image_file(folder, name) for name in names}
    originals = {name: image_file(images, name) for name, file in aligned.items() if file is None}
    for name, file in originals.items():
        if file is None:
            raise UserError(f"{folder}/{name}.png: there is no such aligned face, and no image of it in {images}, which was "
                            "aligned; put LFW's own images there")

    def read(name: str) -> np.ndarray:
        if name in originals:
            return centre_crop(read_image(originals[name]), TEMPLATES[template])
        return read_aligned(aligned[name])

    sums = mirror_sum(embed_both(names, template=template, read=read))
    return dict(zip(names, sums, strict=True)), set(originals)


def image_file(folder: Path, name: str) -> Path | None:
    """The file of an image `<identity>/<image>`, whatever its suffix."""
    suffixes = (suffix for one in IMAGE_SUFFIXES for suffix in (one, one.upper()))
    return next((file for suffix in suffixes if (file := folder / f"{name}{suffix}").is_file()), None)
