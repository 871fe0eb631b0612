"""Stage 1: the identities to sample, as contexts on the unit hypersphere of a face recogniser's embeddings.

Reads:  nothing (contexts.source=uniform), mean and covariance of real embeddings (gaussian), a contexts file
        (published), or a folder of aligned faces (extracted)
Writes: <output>/contexts/<name>.npz   ids [N], contexts [N, D] float32 of unit norm
        <output>/contexts/<name>.json  the settings, versions and digests they were made with
        <output>/contexts/<name>.crowding.png  how close each identity comes to another

    python create_sample_identity_contexts.py
    python create_sample_identity_contexts.py contexts.number=15000 contexts.seed=1
    python create_sample_identity_contexts.py contexts.source=published contexts.file=data/published/contexts.npy
    python create_sample_identity_contexts.py contexts.source=extracted contexts.faces=output/my-photos/aligned
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from config import places
from config.config import Contexts
from config.load import load_config
from utils.faces.folders import identity_folders, listing
from utils.identities import contexts as identity_contexts
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import save_figure
from utils.runtime.files import file_digest, read_npz, require_file
from utils.runtime.records import Record, State

RECOGNISER_FIX = "give the weights of a recogniser (contexts.recogniser), or set contexts.source=uniform"
STATISTICS_FIX = "train_diffusion.py writes such a file; or set contexts.source=uniform"
FILE_FIX = "give the contexts file, or set contexts.source=uniform"


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts"))
    file = places.contexts_file(config)

    # Leave finished contexts alone
    decides, sources = made_from(config.contexts)
    record = Record(file.with_suffix(".json"), decides, "contexts.name", target=file, sources=sources)
    if record.state() is State.DONE:
        print(f"{file}: exists, made with the same settings")
        return

    # Draw, read or extract
    ids, contexts = make(config.contexts, config.device)
    source = {"uniform": file, "gaussian": file, "published": config.contexts.file, "extracted": config.contexts.faces}
    identity_contexts.check_contexts(source[config.contexts.source], ids, contexts)

    # How crowded they are
    crowding = identity_contexts.crowding(contexts)
    median, high, highest = np.quantile(crowding, (0.5, 0.99, 1))
    most, other = identity_contexts.closest_pair(contexts, crowding)
    print(f"{len(ids)} contexts, {contexts.shape[1]} wide; highest cosine to another: median {median:.3f}, "
          f"99% {high:.3f}, highest {highest:.3f} ('{ids[most]}' and '{ids[other]}')")

    # Save, the contexts last: where they exist, their record and plot do
    with record.making(digest=identity_contexts.digest(ids, contexts), config=asdict(config)) as is_new:
        if is_new:
            save_figure(crowding_plot(crowding, file.stem), file.with_suffix(".crowding.png"))
            identity_contexts.write(file, ids, contexts)
    print(f"{file}: written, with .json and .crowding.png beside it")


def made_from(settings: Contexts) -> tuple[dict[str, Any], list[Path]]:
    """What the contexts depend on, as it goes into their record, and the files among it."""
    files = []
    if settings.source == "uniform":
        decides = {name: getattr(settings, name) for name in ("number", "dimension", "seed")}
    elif settings.source == "gaussian":
        files = [require_file(settings.statistics, "contexts.statistics", STATISTICS_FIX)]
        decides = {"number": settings.number, "seed": settings.seed, "statistics": file_digest(files[0])}
    elif settings.source == "published":
        files = [require_file(settings.file, "contexts.file", FILE_FIX)]
        decides = {"file": file_digest(files[0])}
    else:
        from models.published import backbone_digest, backbone_files
        files = backbone_files(require_file(settings.recogniser, "contexts.recogniser", RECOGNISER_FIX))
        decides = {"faces": listing(identity_folders(settings.faces)), "per": settings.per,
                   "recogniser": backbone_digest(settings.recogniser)}
    if settings.source in ("uniform", "gaussian") and settings.highest_cosine < 1:  # 1: which earlier records do not name
        decides["highest_cosine"] = settings.highest_cosine
    return {f"contexts.{name}": value for name, value in ({"source": settings.source} | decides).items()}, files


def make(settings: Contexts, device: str) -> tuple[list[str], np.ndarray]:
    """ids [N] and contexts [N, D] float32, unit norm, from the configured source."""
    if settings.source in ("uniform", "gaussian"):
        # Zero-padded, so that file-name order is the contexts' order.
        ids = [f"{row:06d}" for row in range(settings.number)]
        if settings.source == "uniform":
            return ids, identity_contexts.uniform(settings.number, settings.dimension, settings.seed,
                                                  settings.highest_cosine)
        statistics = read_npz(settings.statistics, ("mean", "covariance"), fix=STATISTICS_FIX)
        check_statistics(settings.statistics, **statistics)
        return ids, identity_contexts.gaussian(settings.number, **statistics, seed=settings.seed,
                                               highest_cosine=settings.highest_cosine)
    if settings.source == "published":
        from models.published import load_contexts  # slow to import, and uniform contexts do without
        return load_contexts(settings.file)
    from utils.recognition.extraction import extract
    return extract(settings.faces, settings.recogniser, distributed.alone(device), settings.per)


def check_statistics(file: str, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Raises UserError where they are not the finite mean [D] and symmetric covariance [D, D] of embeddings."""
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise UserError(f"{file}: holds a mean {mean.dtype} {mean.shape} and a covariance {covariance.dtype} {covariance.shape}, "
                        f"not floats [D] and [D, D]; {STATISTICS_FIX}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.allclose(covariance, covariance.T, atol=1e-6)):
        raise UserError(f"{file}: its numbers are not finite, or its covariance is not symmetric; {STATISTICS_FIX}")


def crowding_plot(crowding: np.ndarray, name: str) -> Figure:
    """A histogram of each context's highest cosine to another."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(crowding, bins=100)
    axes.axvline(np.median(crowding), color="black", linestyle="--", label=f"median {np.median(crowding):.3f}")
    axes.set(title=name, xlabel="highest cosine to another identity", ylabel="identities")
    axes.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    run_script(main)
