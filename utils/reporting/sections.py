"""What the sections of the page show, apart from the paper's rows."""
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from config import places
from utils.faces.aligned import read_list
from utils.reporting import charts
from utils.reporting.gathering import GROUPS, Run, grouped, number, table, training_log
from utils.reporting.pictures import Pictures

IDENTITIES, IMAGES, FACES = 32, 6, 1500  # at most: identities and images of each in the comparison, faces in all
FAILURES = 24  # thumbnails
# docs/experiment.md; README says the same.
WHAT_TO_USE = (
    "To train recognisers, use --preset recommended, Far at w = 0.5 with perturbed contexts: with the included generator and "
    "200 identities x 15 images (three seeds), its recognisers have 1.07 times the TAR of those of w = 0 at FAR 1e-2 (90% "
    "intervals 1.04 to 1.11 on LFW, 1.04 to 1.10 on CelebA) and 1.18 and 1.13 times at FAR 1e-3, Far alone 1.00 and 0.99, and "
    "1.04 and 0.99 times. For a high FDR, use Far alone, the default: 4.9 against 2.1 at w = 0; perturbed contexts, which make "
    "an identity's images differ, leave 2.6.")


def faces(runs: Sequence[Run], pictures: Pictures) -> Mapping[str, Any]:
    """Identities that all runs have, evenly spaced by name, and the same images of each in every run."""
    first = runs[0].images
    shared = [name for name in first if all(name in run.images for run in runs)]
    count, rows = min(len(shared), IDENTITIES, max(1, FACES // (IMAGES * len(runs)))), []
    for place in tqdm(np.linspace(0, len(shared) - 1, count).round().astype(int), desc="faces", unit="identity", delay=1):
        name, before = shared[place], pictures.left
        rows.append((name, [[pictures.shown(run.image(name, file.name), file.stem) for file in first[name][:IMAGES]]
                            for run in runs]))
        if before - pictures.left > pictures.left:  # the next row would be cut
            break
    return {"rows": rows, "identities": len(shared), "each": sum(map(len, first.values())) / len(first)}


def similar_pairs(runs: Sequence[Run], pictures: Pictures) -> list[tuple]:
    """Each run's two most similar identities: the run, the cosine, and names with some of their images."""
    pairs = []
    for run in runs:
        pair = run.metrics.get("most_similar_identities")
        if isinstance(pair, list) and len(pair) == 3:
            both = {name: run.images.get(name, ())[:3] for name in map(str, pair[:2])}
            pairs.append((run, number(pair[2]), [(name, [pictures.shown(file, file.stem) for file in files])
                                                 for name, files in both.items()]))
    return pairs


def alignment(runs: Sequence[Run], pictures: Pictures) -> Mapping[str, Any]:
    """How many alignments failed in each run and why, thumbnails of the first, and the runs that were not aligned."""
    rows, shown = [], []
    aligned = [run for run in runs if (places.aligned(run.folder) / "failures.csv").is_file()]
    for run in aligned:
        failed, sources = (read_list(places.aligned(run.folder) / f"{name}.csv", name) for name in ("failures", "sources"))
        rows.append({"run": run, "failed": len(failed), "images": len(failed.keys() | sources.keys()),
                     "reasons": Counter(failed.values()).most_common(5)})
        for (identity, name), reason in list(failed.items())[: FAILURES - len(shown)]:
            shown.append((run, identity, reason, pictures.shown(run.image(identity, name), name)))
    return {"rows": rows, "shown": shown, "failed": sum(row["failed"] for row in rows),
            "missing": [run for run in runs if run not in aligned]}


def training(runs: Sequence[Run]) -> list[dict]:
    """Charts of the recognisers' losses and held-out accuracies."""
    logs = [(f"{run.name}/{folder.name}", run.number, rows) for run in runs for folder in places.fr_folders(run.folder)
            if (rows := training_log(folder / "log.csv"))]
    return [charts.training_curves(having, column) for column in ("loss", "held_out_accuracy")
            if (having := [log for log in logs if any(column in row for row in log[2])])]


def provenance(runs: Sequence[Run]) -> Mapping[str, Any]:
    """Commands in the order of the stages, and what their records say."""
    every = sorted(((run.name, stage) for run in runs for stage in run.stages),
                   key=lambda pair: list(GROUPS).index(pair[1].script))
    return {"commands": list(dict.fromkeys(stage.command() for _, stage in every)),
            "made": [(title, grouped([(name, *item) for name, stage in every for item in items(stage)])) for title, items in (
                ("Settings", lambda stage: stage.settings()),
                ("Versions", lambda stage: table(stage.record.get("versions")).items()),
                ("SHA-256 of what it was made from", lambda stage: stage.digests()))],
            "times": [(name, stage.script, *stage.times()) for name, stage in every]}
