"""Stage 7: verify a recogniser on the benchmarks whose files are there.

Reads   a backbone: the run's training (stage 6), or verify.backbone in any supported format; benchmarks (config verify):
        insightface's .bin files, pair lists in LFW's format, all pairs of folders of faces, IJB-C
Writes  verification.json beside the backbone of a training run, of any other in <output>/verification/<backbone>-<digest>/

    python verify_fr.py verify.bins=data/benchmarks
    python verify_fr.py verify.backbone=... verify.lfw_pairs=data/pairs.txt verify.lfw_faces=output/lfw/aligned
    python verify_fr.py verify.backbone=... verify.all_pairs=output/lfw/aligned verify.people=data/some_people.txt
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from config import places
from config.load import load_config
from models.published import backbone_digest, load_backbone
from utils.evaluation.all_pairs import tar_at_far, tar_name
from utils.evaluation.face_sets import FaceSet, embed_folder, face_sets, pair_lists
from utils.evaluation.paper import IJBC_FAR, MEAN_OF
from utils.evaluation.tables import all_pairs_table, verification_table
from utils.evaluation.verification import BENCHMARKS, decode, ijb, mirror_sum, read_bin, read_ijbc_meta, ten_fold
from utils.faces.images import read_image
from utils.faces.template import TEMPLATES, warp
from utils.recognition.embedding import embed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import require_file, sweep, write_json
from utils.runtime.records import versions


def main() -> None:
    config = load_config(__doc__, reads=("paths", "verify", "fr"))
    settings, device = config.verify, distributed.alone(config.device)
    if not (settings.lfw_pairs or settings.bins or settings.ijbc or settings.all_pairs):
        raise UserError("verify: no benchmark is given; set verify.bins, verify.lfw_pairs with verify.lfw_faces, "
                        "verify.all_pairs, or verify.ijbc")
    file = require_file(settings.backbone or places.fr_folder(config) / "backbone.safetensors", "verify.backbone",
                        "run train_fr.py, or give a backbone")
    embed_both = partial(embed, load_backbone(file), device=device, mirror=True)
    lists = pair_lists(settings.lfw_pairs, settings.lfw_faces)
    sets = face_sets(settings.all_pairs, settings.people, settings.images_per_identity)

    # pairs of images: the .bin benchmarks, and what is made of folders of faces
    results, counts, of_all_pairs = {}, {}, {}
    bins = {name: bin_file for name, stem in BENCHMARKS.items()
            if settings.bins and (bin_file := Path(settings.bins) / f"{stem}.bin").is_file()}
    if settings.bins and not bins:
        raise UserError(f"{settings.bins}: holds none of {', '.join(f'{stem}.bin' for stem in BENCHMARKS.values())}; give "
                        "the folder with insightface's benchmarks (verify.bins)")
    if twice := sorted(bins.keys() & {item.name for item in lists}):
        raise UserError(f"verify.lfw_pairs: {twice[0]} is in verify.bins too ({bins[twice[0]]}); leave one of them out")
    for name, bin_file in bins.items():
        images, same = read_bin(bin_file)
        embeddings = mirror_sum(embed_both(images, read=decode))
        results[name] = ten_fold(embeddings[0::2], embeddings[1::2], same, bin_file)
        counts[name] = {"pairs": len(same)}
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

    # templates of images: IJB-C, aligned by the meta file's landmarks to the unshifted template
    if settings.ijbc:
        meta, folder = read_ijbc_meta(Path(settings.ijbc) / "meta"), Path(settings.ijbc) / "loose_crop"
        crops = [(folder / name, points) for name, points in zip(meta.names, meta.landmarks, strict=True)]
        features = embed_both(crops, read=lambda crop: warp(read_image(crop[0]), crop[1], TEMPLATES["arcface"]))
        _, tar = ijb(features, meta, list(IJBC_FAR.values()))
        percent |= {name: 100 * value for name, value in zip(IJBC_FAR, tar, strict=True)}

    digest = backbone_digest(file)
    target = places.verification_file(file, digest, config)
    sweep(target.parent)
    write_json(target, {"backbone": str(file), "digest": digest, "per_cent": percent,
                        "standard_deviation": {name: 100 * std for name, (_, std) in results.items()},
                        "counts": counts, "all_pairs": of_all_pairs, "config": asdict(config), "versions": versions()})
    print(verification_table(file, percent))
    if of_all_pairs:
        print(all_pairs_table(of_all_pairs))
    for name, (mean, std) in results.items():
        notes = ", ".join(f"{value} {what}" for what, value in counts[name].items())
        print(f"{name}: {100 * mean:.2f}% +- {100 * std:.2f} over ten folds ({notes})")
    print(f"written to {target}")


def verify_all_pairs(item: FaceSet, embeddings: Mapping[str, np.ndarray], device: torch.device) -> dict:
    """TAR at FAR over all pairs, in per cent, with 90% intervals over identities."""
    labels = [identity for identity, names in item.faces.items() for _ in names]
    result = tar_at_far(np.stack([embeddings[name] for name in item.names()]), labels, device=device)
    return {"identities": len(item.faces), "images": len(labels), "genuine_pairs": result.genuine_pairs,
            "impostor_pairs": result.impostor_pairs,
            "per_cent": {tar_name(far): 100 * tar for far, tar in result.tar.items()},
            "intervals": {tar_name(far): [100 * limit for limit in limits] for far, limits in result.intervals.items()}}


if __name__ == "__main__":
    run_script(main)
