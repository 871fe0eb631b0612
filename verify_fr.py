"""Stage 7: verify a recogniser on the benchmarks whose files are there.

Reads   a backbone: the run's training (stage 6), or verify.backbone in any supported format; benchmarks (config verify)
Writes  verification.json beside the backbone of a training, of any other in <output>/verification/<backbone>/

    python verify_fr.py verify.bins=data/benchmarks
    python verify_fr.py verify.backbone=... verify.lfw_pairs=data/pairs.txt verify.lfw_faces=output/lfw/aligned
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from config import places
from config.config import Verify
from config.load import load_config
from models.published import backbone_digest, load_backbone
from utils.evaluation.verification import BENCHMARKS, ijb, read_bin, read_ijbc_meta, read_lfw_pairs, ten_fold
from utils.faces.aligned import read_aligned
from utils.faces.images import IMAGE_SUFFIXES, read_image
from utils.faces.template import SIZE, TEMPLATES, centre_crop, warp
from utils.recognition.embedding import embed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import require_file, write_json
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
    if not (settings.lfw_pairs or settings.bins or settings.ijbc):
        raise UserError("verify: no benchmark is given; set verify.bins, verify.lfw_pairs with verify.lfw_faces, or "
                        "verify.ijbc")
    file = require_file(settings.backbone or places.fr_folder(config) / "backbone.safetensors", "verify.backbone",
                        "run train_fr.py, or give a backbone")
    backbone = load_backbone(file)
    embed_both = functools.partial(embed, backbone, device=device, mirror=True)

    # pairs of images, in per cent: the .bin benchmarks, and LFW from its own images
    results, counts = {}, {}
    for name, stem in BENCHMARKS.items():
        if settings.bins and (bin_file := Path(settings.bins) / f"{stem}.bin").is_file():
            images, same = read_bin(bin_file)
            embeddings = mirror_sum(embed_both(images, read=decode))
            results[name], counts[name] = ten_fold(embeddings[0::2], embeddings[1::2], same), {"pairs": len(same)}
    if settings.bins and not results:
        raise UserError(f"{settings.bins}: holds none of {', '.join(f'{stem}.bin' for stem in BENCHMARKS.values())}; give "
                        "the folder with insightface's benchmarks (verify.bins)")
    if settings.lfw_pairs:
        results["LFW"], counts["LFW"] = verify_lfw(settings, embed_both)
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
    write_json(target, {"backbone": str(file), "digest": digest, "per_cent": percent,
                        "standard_deviation": {name: 100 * std for name, (_, std) in results.items()},
                        "counts": counts, "config": asdict(config), "versions": versions()})
    print(markdown_table(file, percent))
    for name, (mean, std) in results.items():
        notes = ", ".join(f"{value} {what}" for what, value in counts[name].items())
        print(f"{name}: {100 * mean:.2f}% +- {100 * std:.2f} over ten folds ({notes})")
    print(f"written to {target}")


def verify_lfw(settings: Verify, embed_both: functools.partial) -> tuple[tuple[float, float], dict[str, int]]:
    """LFW's view 2 on faces aligned by align.py; an image without a detected face falls back to a centre crop."""
    pairs, same = read_lfw_pairs(settings.lfw_pairs)
    alignment = decided(places.alignment_record(Path(settings.lfw_faces)), ("align.template", "align.images"),
                        "align LFW by align.py with align.template=arcface, and give its folder aligned/ (verify.lfw_faces)")
    template = alignment["align.template"]
    names = sorted({name for pair in pairs for name in pair})
    aligned = {name: Path(settings.lfw_faces) / f"{name}.png" for name in names}
    undetected = [name for name in names if not aligned[name].is_file()]
    originals = {name: original_image(settings, Path(alignment["align.images"]), name) for name in undetected}

    def read(name: str) -> np.ndarray:
        if name in originals:
            return centre_crop(read_image(originals[name]), TEMPLATES[template])
        return read_aligned(aligned[name])

    embeddings = dict(zip(names, mirror_sum(embed_both(names, template=template, read=read)), strict=True))
    first, second = (np.stack([embeddings[pair[side]] for pair in pairs]) for side in (0, 1))
    return ten_fold(first, second, same), {"pairs": len(pairs), "centre crops": len(undetected)}


def original_image(settings: Verify, images: Path, name: str) -> Path:
    """The file of LFW's image `<person>/<image>` in the folder that was aligned. Raises UserError where there is none."""
    for suffix in IMAGE_SUFFIXES:
        if (file := images / f"{name}{suffix}").is_file():
            return file
    raise UserError(f"{settings.lfw_faces}/{name}.png: there is no such aligned face, and no image of it in {images}, which was "
                    "aligned; put LFW's own images there")


def mirror_sum(both: np.ndarray) -> np.ndarray:
    """[N, 2 D], embeddings of images and of their mirror images -> their sums [N, D]."""
    return both[:, : both.shape[1] // 2] + both[:, both.shape[1] // 2 :]


def decode(encoded: bytes) -> np.ndarray:
    """An encoded benchmark image, uint8 [112, 112, 3] RGB. Raises UserError where it is none."""
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None or image.shape[:2] != (SIZE, SIZE):
        raise UserError(f"verify.bins: an image is damaged or not {SIZE} x {SIZE}; download the benchmarks again")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def align_crop(file: Path, landmarks: np.ndarray) -> np.ndarray:
    """A loose crop of IJB-C, aligned by the meta file's landmarks [5, 2] to the unshifted template."""
    return warp(read_image(file), landmarks, TEMPLATES["arcface"])


def markdown_table(backbone: Path, percent: dict[str, float]) -> str:
    """The backbone's row above the paper's, in per cent."""
    def row(name: str, values: Sequence[float | None]) -> str:
        return f"| {name} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |"

    lines = ["| trained on | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(row(f"this: {backbone.parent.name}/{backbone.name}", [percent.get(name) for name in COLUMNS]))
    lines += [row(f"paper: {name}", [dict(zip(PAPER_COLUMNS, values, strict=True)).get(column) for column in COLUMNS])
              for name, values in PAPER.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
