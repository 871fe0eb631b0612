"""Stage 7: verify a recogniser on the benchmarks whose files are there.

Reads   a backbone: the run's training (stage 6), or verify.backbone in any supported format; benchmarks (config verify):
        insightface's .bin files, pair lists in LFW's format, all pairs of folders of faces, IJB-C
Writes  verification.json beside the backbone of a training run, of any other in <output>/verification/<backbone>/

    python verify_fr.py verify.bins=data/benchmarks
    python verify_fr.py verify.backbone=... verify.lfw_pairs=data/pairs.txt verify.lfw_faces=output/lfw/aligned
    python verify_fr.py verify.backbone=... verify.all_pairs=output/lfw/aligned verify.people=data/some_people.txt
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from config import places
from config.config import Verify
from config.load import load_config
from models.published import backbone_digest, load_backbone
from utils.evaluation import all_pairs
from utils.evaluation.verification import BENCHMARKS, ijb, read_bin, read_ijbc_meta, read_lfw_pairs, ten_fold
from utils.faces.aligned import read_aligned, read_list
from utils.faces.folders import identity_folders
from utils.faces.images import FORMATS, IMAGE_SUFFIXES, read_image
from utils.faces.template import SIZE, TEMPLATES, centre_crop, warp
from utils.recognition.embedding import embed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, is_out_of_memory, run_script
from utils.runtime.files import read_names, require_file, sweep, write_json
from utils.runtime.records import decided, versions

FAR = {"IJB-C TAR@1e-5": 1e-5, "IJB-C TAR@1e-4": 1e-4}

# NegFaceDiff (arXiv 2508.09661): trained on 10,000 identities x 50 images of each generator, in per cent.
PAPER_COLUMNS = ("LFW", "AgeDB-30", "CFP-FP", "CALFW", "CPLFW", "mean", *FAR)
PAPER = {
    "IDiff-Face (FFHQ)": (98.00, 86.43, 85.47, 90.65, 80.45, 88.20, 20.60, 62.60),
    "NegFaceDiff (FFHQ)": (97.60, 86.53, 85.33, 90.28, 80.73, 88.10, 58.09, 73.93),
    "IDiff-Face (CASIA)": (98.93, 89.55, 91.37, 91.38, 87.38, 91.72, 7.69, 53.75),
    "NegFaceDiff (CASIA)": (98.98, 90.02, 91.67, 91.65, 88.82, 92.23, 77.38, 86.11),
    "CASIA-WebFace, real": (99.55, 94.55, 95.31, 93.78, 89.95, 94.63, 93.96, 96.05),
}
MEAN_OF = PAPER_COLUMNS[:5]
COLUMNS = (*BENCHMARKS, "mean", *FAR)


def main() -> None:
    config = load_config(__doc__, reads=("paths", "verify", "fr"))
    settings, device = config.verify, distributed.alone(config.device)
    if not (settings.lfw_pairs or settings.bins or settings.ijbc or settings.all_pairs):
        raise UserError("verify: no benchmark is given; set verify.bins, verify.lfw_pairs with verify.lfw_faces, "
                        "verify.all_pairs, or verify.ijbc")
    file = require_file(settings.backbone or places.fr_folder(config) / "backbone.safetensors", "verify.backbone",
                        "run train_fr.py, or give a backbone")
    backbone = load_backbone(file)
    embed_both = functools.partial(embed, backbone, device=device, mirror=True)
    lists, sets = pair_lists(settings), face_sets(settings)

    # pairs of images, in per cent: the .bin benchmarks, and what is made of folders of faces
    results, counts = {}, {}
    for name, stem in BENCHMARKS.items():
        if settings.bins and (bin_file := Path(settings.bins) / f"{stem}.bin").is_file():
            images, same = read_bin(bin_file)
            embeddings = mirror_sum(embed_both(images, read=decode))
            results[name] = ten_fold(embeddings[0::2], embeddings[1::2], same, bin_file)
            counts[name] = {"pairs": len(same)}
    if settings.bins and not results:
        raise UserError(f"{settings.bins}: holds none of {', '.join(f'{stem}.bin' for stem in BENCHMARKS.values())}; give "
                        "the folder with insightface's benchmarks (verify.bins)")
    of_all_pairs = {}
    for folder in dict.fromkeys(item.folder for item in (*lists, *sets)):
        here, sets_here = ([item for item in items if item.folder == folder] for items in (lists, sets))
        names = {name for item in (*here, *sets_here) for name in item.names()}
        embeddings, undetected = embed_folder(folder, names, embed_both)
        for item in here:
            first, second = (np.stack([embeddings[pair[side]] for pair in item.pairs]) for side in (0, 1))
            results[item.name] = ten_fold(first, second, item.same, item.name)
            counts[item.name] = {"pairs": len(item.pairs), "centre crops": len(undetected.intersection(item.names()))}
        for item in sets_here:
            of_all_pairs[item.name] = verify_all_pairs(item, embeddings, device) | {
                "centre crops": len(undetected.intersection(item.names()))}
    percent = {name: 100 * mean for name, (mean, _) in results.items()}
    if all(name in percent for name in MEAN_OF):
        percent["mean"] = sum(percent[name] for name in MEAN_OF) / len(MEAN_OF)

    # templates of images: IJB-C
    if settings.ijbc:
        meta = read_ijbc_meta(Path(settings.ijbc) / "meta")
        crops = [(Path(settings.ijbc) / "loose_crop" / name, points)
                 for name, points in zip(meta.names, meta.landmarks, strict=True)]
        features = embed_both(crops, read=lambda crop: align_crop(*crop))
        _, tar = ijb(features, meta.faceness, meta.template, meta.media, meta.p1, meta.p2, meta.label,
                     list(FAR.values()))
        percent |= {name: 100 * value for name, value in zip(FAR, tar, strict=True)}

    digest = backbone_digest(file)
    target = places.verification_file(file, digest, config)
    sweep(target.parent)
    write_json(target, {"backbone": str(file), "digest": digest, "per_cent": percent,
                        "standard_deviation": {name: 100 * std for name, (_, std) in results.items()},
                        "counts": counts, "all_pairs": of_all_pairs, "config": asdict(config), "versions": versions()})
    print(markdown_table(file, percent))
    if of_all_pairs:
        print(all_pairs_table(of_all_pairs))
    for name, (mean, std) in results.items():
        notes = ", ".join(f"{value} {what}" for what, value in counts[name].items())
        print(f"{name}: {100 * mean:.2f}% +- {100 * std:.2f} over ten folds ({notes})")
    print(f"written to {target}")


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


def pair_lists(settings: Verify) -> list[PairList]:
    """The lists of verify.lfw_pairs with their folders. Raises UserError where a folder is missing or two share a name."""
    folders = settings.lfw_faces * (len(settings.lfw_pairs) if len(settings.lfw_faces) == 1 else 1)
    if settings.lfw_pairs and len(folders) != len(settings.lfw_pairs):
        raise UserError(f"verify.lfw_faces: {len(folders)} folders for the pair lists {', '.join(settings.lfw_pairs)}; give one "
                        "for all of them, or one for each")
    lists = {}
    for file, folder in zip(settings.lfw_pairs, map(Path, folders), strict=False):
        pairs, same = read_lfw_pairs(file)
        _, images = alignment(folder)
        is_lfw = any("lfw" in part.lower() for path in (Path(file), folder, images) for part in path.parts[-2:])
        stem = Path(file).stem.removesuffix("_pairs")
        name = "LFW" if is_lfw and "LFW" not in lists else Path(file).absolute().parent.name if stem == "pairs" else stem
        if name in lists:
            raise UserError(f"{file}: another pair list is called {name} too; rename the file")
        lists[name] = PairList(name, folder, pairs, same)
    return list(lists.values())


def face_sets(settings: Verify) -> list[FaceSet]:
    """The folders of verify.all_pairs, with the images in which align.py found no face; of the people of verify.people.

    Raises:
        UserError: there are more lists of people than folders, a folder holds no faces, or a list names someone else.
    """
    if len(settings.people) > len(settings.all_pairs):
        raise UserError(f"verify.people: {len(settings.people)} lists for {len(settings.all_pairs)} folders of verify.all_pairs; "
                        "give one for each folder at most")
    sets = []
    for folder, people in zip_longest(map(Path, settings.all_pairs), settings.people):
        files = [file for images in identity_folders(folder).values() for file in images]
        if (failures := folder / "failures.csv").is_file():
            files += [Path(identity, image) for identity, image in read_list(failures, "failures")]
        faces: dict[str, list[str]] = {}
        for file in sorted(files):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                faces.setdefault(file.parent.name, []).append(f"{file.parent.name}/{file.stem}")
        if people:
            chosen = read_names(people, "verify.people", faces)
            faces = {name: names for name, names in faces.items() if name in chosen}
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
    return record["align.template"], Path(record["align.images"])


def embed_folder(folder: Path, names: Iterable[str], embed_both: functools.partial) -> tuple[dict[str, np.ndarray], set[str]]:
    """The embedding of each `<identity>/<image>` of a folder, [D], the sum of the image's and its mirror image's.

    An image without a detected face is cropped at its centre; these come second.
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
    return next((file for suffix in IMAGE_SUFFIXES if (file := folder / f"{name}{suffix}").is_file()), None)


def verify_all_pairs(faces: FaceSet, embeddings: Mapping[str, np.ndarray], device: torch.device) -> dict:
    """TAR at FAR over all pairs, in per cent, with 90% intervals over identities."""
    labels = [identity for identity, names in faces.faces.items() for _ in names]
    result = all_pairs.tar_at_far(np.stack([embeddings[name] for name in faces.names()]), labels, device=device)
    return {"identities": len(faces.faces), "images": len(labels), "genuine_pairs": result.genuine_pairs,
            "impostor_pairs": result.impostor_pairs,
            "per_cent": {tar_name(far): 100 * tar for far, tar in result.tar.items()},
            "intervals": {tar_name(far): [100 * limit for limit in limits] for far, limits in result.intervals.items()}}


def tar_name(far: float) -> str:
    return f"TAR@1e-{round(-math.log10(far))}"


def mirror_sum(both: np.ndarray) -> np.ndarray:
    """[N, 2 D], embeddings of images and of their mirror images -> their sums [N, D]."""
    return both[:, : both.shape[1] // 2] + both[:, both.shape[1] // 2 :]


def decode(encoded: bytes) -> np.ndarray:
    """An encoded benchmark image, uint8 [112, 112, 3] RGB. Raises UserError where it is none.

    OpenCV decodes it, as where the published figures were measured, but Pillow says first what it is and how large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as header:
            if header.size != (SIZE, SIZE):
                raise ValueError(header.size)
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    except Exception as error:  # whatever a damaged image makes of a decoder
        if is_out_of_memory(error):
            raise
        raise UserError(f"verify.bins: an image is damaged or not {SIZE} x {SIZE}; download the benchmarks again") from None


def align_crop(file: Path, landmarks: np.ndarray) -> np.ndarray:
    """A loose crop of IJB-C, aligned by the meta file's landmarks [5, 2] to the unshifted template."""
    return warp(read_image(file), landmarks, TEMPLATES["arcface"])


def markdown_table(backbone: Path, percent: dict[str, float]) -> str:
    """The backbone's row above the paper's, in per cent."""
    def row(name: str, values: Sequence[float | None]) -> str:
        return f"| {name} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |"

    columns = (*COLUMNS, *(name for name in percent if name not in COLUMNS))
    lines = ["| trained on | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines.append(row(f"this: {backbone.parent.name}/{backbone.name}", [percent.get(name) for name in columns]))
    lines += [row(f"paper: {name}", [dict(zip(PAPER_COLUMNS, values, strict=True)).get(column) for column in columns])
              for name, values in PAPER.items()]
    return "\n".join(lines) + "\n"


def all_pairs_table(results: Mapping[str, Mapping]) -> str:
    """TAR at FAR over all pairs, in per cent, with 90% intervals over identities; empty where the pairs do not suffice."""
    columns = [tar_name(far) for far in all_pairs.FAR]
    lines = ["| all pairs of | images | people | genuine + impostor pairs | " + " | ".join(columns) + " |",
             "|---" * (len(columns) + 4) + "|"]
    for name, result in results.items():
        cells = []
        for column in columns:
            value, limits = result["per_cent"].get(column), result["intervals"].get(column)
            cells.append("" if value is None else f"{value:.2f}" + (" ({:.2f} to {:.2f})".format(*limits) if limits else ""))
        lines.append(f"| {name} | {result['images']:,} | {result['identities']:,} | {result['genuine_pairs']:,} + "
                     f"{result['impostor_pairs']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
