"""Stage 4: find the face in every image and bring its five landmarks onto the recognisers' template, 112 x 112.

Reads   <run>/samples/<identity>/<image>, or any folder of identity folders: align.images
Writes  <run>/aligned/<identity>/<image>.png  112 x 112 RGB
        <run>/aligned/failures.csv            identity, image, reason: no face, impossible landmarks, unreadable
        <run>/aligned/sources.csv             identity, image, sha256 of the image that was aligned or failed
        <run>/aligned/kept.csv                identity, image: the first align.keep_images faces of the first
                                              align.keep_identities identities that have enough
        <run>/aligned/align.json              settings and versions
        <run>/aligned/outside_band.csv        align.band: identity, image, reason of faces that are not kept. It reads the
                                              contexts (stage 1) and contexts.recogniser, and leaves cosines.npz
        <run>/aligned/README.md               a dataset card, where the images are the run's own samples

    python align.py
    python align.py align.images=data/my-photos paths.run=my-photos
    torchrun --nproc_per_node=8 align.py --preset paper_casia

Running the same command again continues: what was aligned or failed stays as it is, unless the image is another one now.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from config import places
from config.config import Config
from config.load import load_config
from utils.faces.aligned import image_key, keep, merge, output_files, read_list, write_kept, write_list, write_lists
from utils.faces.dataset_card import write_cards
from utils.faces.detection import DETECTOR, FaceBatches, in_processes
from utils.faces.folders import contents, identity_folders, misplaced_images, other_files
from utils.faces.image_writer import ImageWriter, is_complete_png, png_size, require_complete
from utils.faces.template import SIZE, TEMPLATES, warp
from utils.identities import contexts as identity_contexts
from utils.recognition.band import Band, faces_in_band
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import require_file
from utils.runtime.progress import StageBar, announce
from utils.runtime.records import Record, decided, noted

BATCH = 64  # images detected together
SAVE_SECONDS = 10  # between two writings of the failures
BAND_FIX = ("align.band compares faces with contexts by the recogniser that these are of, and that of the included generator is "
            "not included; give it, or turn align.band off")


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "align"))
    ranks = distributed.setup(config.device)
    settings, run = config.align, places.run_folder(config)
    aligned, root = places.aligned(run), settings.images or places.samples(run)
    folders = ranks.from_main(lambda: identity_folders(root))  # of all ranks the same, whatever else is being written there
    outputs, others = output_files(folders, aligned), other_files(root)
    keys = {image_key(image) for image in (*outputs, *others)}
    band = read_band(config, folders, ranks.device) if settings.band and ranks.is_main else None

    # the run's record: a folder begun with other settings is refused
    record = Record(places.alignment_record(aligned), {
        "detector": DETECTOR, **{f"align.{name}": getattr(settings, name) for name in ("images", "template", "minimum_face")}},
        "paths.run", contents=aligned)
    ranks.on_main(lambda: record.begin(config=asdict(config)))
    ranks.on_main(lambda: merge(aligned, keys))

    # what is left to do; an image is always detected among the same neighbours, so that its face is the same to the
    # last bit whatever was done before
    images = list(outputs)
    batches = ranks.shard([images[start : start + BATCH] for start in range(0, len(images), BATCH)])
    mine = [image for batch in batches for image in batch]
    digests = dict(zip(mine, contents(mine), strict=True))
    left = left_to_align(digests, outputs, aligned)
    ranks.print(f"{aligned}: {len(left)} of this process's {len(mine)} images are left to align")
    batches = [batch for batch in batches if not left.isdisjoint(batch)]
    ranks.barrier()  # all have read the lists

    # align: worker processes read, detect and warp; this one writes
    work = FaceBatches(batches, partial(warp, template=TEMPLATES[settings.template]), settings.minimum_face / 128,
                       ranks.device)
    failed, done, saved = {}, {}, time.monotonic()
    announce("align", len(left), "images", aligned, png_size(SIZE), ranks=ranks)
    with ImageWriter() as writer, StageBar(total=sum(map(len, batches)), unit="image", disable=not ranks.is_main,
                                           desc="align") as progress:
        for batch, results in zip(batches, in_processes(work, settings.processes, ranks.device), strict=True):
            for image, result in zip(batch, results, strict=True):
                if image not in left:
                    continue
                outputs[image].unlink(missing_ok=True)  # of what the image was before: a kill must not leave it as done
                done[image_key(image)] = digests[image]
                if isinstance(result, str):
                    failed[image_key(image)] = result
                else:
                    writer.write(outputs[image], result)
            if time.monotonic() - saved > SAVE_SECONDS:
                write_lists(aligned, failed, done, ranks.rank)
                saved = time.monotonic()
            progress.update(len(batch))
            progress.set_postfix(failed=len(failed))
    require_complete([outputs[image] for image in left if image_key(image) not in failed], aligned, "written", "faces")
    write_lists(aligned, failed, done, ranks.rank)
    ranks.barrier()

    # the selection, and what came out
    if ranks.is_main:
        failed, _ = merge(aligned, keys)
        write_list(aligned, "failures", failed | {image_key(file): "is no image by its name" for file in others})
        for face in set(aligned.glob("*/*.png")).difference(outputs.values()):
            face.unlink()  # its image is gone
        faces = {identity: [outputs[image] for image in images if image_key(image) not in failed]
                 for identity, images in folders.items()}
        every = {identity: [outputs[image] for image in images] for identity, images in folders.items()}
        eligible = faces_in_band(band, aligned, every, faces, settings.keep_images)
        kept = keep(eligible, settings.keep_identities, settings.keep_images)
        write_kept(aligned, kept, config=asdict(config), selected_by=band and band.decides["contexts.recogniser"])
        write_cards(run)
        print(closing_line(aligned, faces, len(outputs), eligible, kept, settings.keep_images, len(others)))
        tell_misplaced(root)
    ranks.close()


def tell_misplaced(root: Path | str) -> None:
    """Say how many images are in no identity folder, if there are any."""
    if misplaced := misplaced_images(root):
        print(f"{root}: {len(misplaced)} images lie in no identity folder, {misplaced[0]} for one; they were left out")


def left_to_align(digests: Mapping[Path, str], outputs: Mapping[Path, Path], aligned: Path) -> set[Path]:
    """Those of the images (and digests of them) that have neither a face nor a reason, or are others than they were."""
    failed, sources = (read_list(aligned / f"{name}.csv", name) for name in ("failures", "sources"))
    return {image for image, digest in digests.items() if sources.get(image_key(image)) != digest
            or (image_key(image) in failed) is is_complete_png(outputs[image])}  # or have both: the list was altered


def read_band(config: Config, folders: Mapping[str, Sequence[Path]], device: torch.device) -> Band:
    """The band filter of the settings. Raises UserError where the contexts or their recogniser are missing, or are others."""
    from models.published import backbone_digest, load_backbone
    from utils.recognition.embedding import embed

    settings, file, run = config.align, places.contexts_file(config), places.run_folder(config)
    recogniser = require_file(config.contexts.recogniser, "contexts.recogniser", BAND_FIX)
    digest = backbone_digest(recogniser)
    if Path(config.scores.recogniser).is_file() and backbone_digest(config.scores.recogniser) == digest:
        raise UserError(f"scores.recogniser: is contexts.recogniser too ({recogniser}), and what it selects (align.band) it "
                        "cannot judge; give another")
    ids, contexts = identity_contexts.read(file)
    content = identity_contexts.digest(ids, contexts)
    if not settings.images and decided(places.run_record(run), ("contexts",), "run sample.py")["contexts"] != content:
        raise UserError(f"{file}: holds other contexts than those of {run}; give the settings `contexts` of that run")
    made = noted(file.with_suffix(".json"), "decides")
    if isinstance(made, dict) and made.get("contexts.recogniser", digest) != digest:
        raise UserError(f"contexts.recogniser: {recogniser} is another recogniser than that of which {file} are the contexts; "
                        "give that one, or turn align.band off")
    if unknown := folders.keys() - set(ids):
        raise UserError(f"align.band: '{min(unknown)}' is no identity of {file}; give the contexts of these images "
                        "(contexts.name), or turn align.band off")
    return Band(*settings.band, dict(zip(ids, contexts, strict=True)),
                partial(embed, load_backbone(recogniser), device=device, template=settings.template),
                {"contexts": content, "contexts.recogniser": digest, "align.template": settings.template})


def closing_line(aligned: Path, faces: Mapping[str, Sequence[Path]], images: int, eligible: Mapping[str, Sequence[Path]],
                 kept: Mapping[str, Sequence[Path]], keep_images: int, others: int) -> str:
    found = sum(map(len, faces.values()))
    enough = sum(len(files) >= max(keep_images, 1) for files in eligible.values())
    return (f"{aligned}: {found} of {images} faces aligned ({found / images:.2%}), {images - found} failed, see "
            f"failures.csv; {enough} of {len(faces)} identities have {max(keep_images, 1)} or more faces, "
            f"{len(kept)} of them are kept, see kept.csv"
            + (f"; {others} other files are no images by their names" if others else ""))


if __name__ == "__main__":
    run_script(main)
