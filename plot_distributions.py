"""Stage 5: how alike are images of one identity, how alike those of two, and how do they vary? Score distributions.

Reads   <run>/aligned/ (stage 4), a recogniser other than the one that made the contexts, real faces (scores.real)
Writes  <run>/scores/<recogniser>/: embeddings.npz, histograms.npz, metrics.json, distributions.png
        the figures in the dataset cards of samples and aligned faces
        with scores.overlay: <folder of its runs>/scores/<recogniser>/distributions.png, table.md, variety.md and faces.png
        (the same identities in every run)
        <output>/faces/: the embeddings of the real faces, cached

    python plot_distributions.py scores.recogniser=data/published/ElasticCos.pth
    python plot_distributions.py scores.recogniser=... scores.overlay=demo/w0,demo/far scores.real=output/lfw/aligned
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import places
from config.config import Config
from config.load import load_config
from models.published import backbone_digest, load_backbone
from utils.evaluation import variety
from utils.evaluation.measures import Scored, measure
from utils.evaluation.plots import plot_faces, plot_scores
from utils.evaluation.scores import read_distributions
from utils.evaluation.tables import score_table, variety_table
from utils.faces.aligned import alignment_setting, read_kept
from utils.faces.dataset_card import write_cards
from utils.faces.folders import select
from utils.recognition.scorer import Scorer, real_faces
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import save_figure
from utils.runtime.files import read_json, write_text
from utils.runtime.progress import announce
from utils.runtime.records import Record, note, noted

REPLICATES = 1000  # of the identities, for the 90% intervals
FACE_SIZE, HISTOGRAMS_SIZE = 3000, 3.3e6  # bytes: a face's embedding (512-d) and path; two histograms


def main() -> None:
    config = load_config(__doc__, reads=("paths", "scores"))
    if not config.scores.recogniser:
        raise UserError("scores.recogniser: is empty; give the weights of a recogniser, not that of the contexts")
    folders = places.run_folders(config)
    device = distributed.alone(config.device)

    if config.scores.real:
        variety.require_prdc()

    # score every run that has no scores yet
    scorer = Scorer(load_backbone(config.scores.recogniser, "scores.recogniser"), backbone_digest(config.scores.recogniser),
                    device)
    real = (None, "")
    if config.scores.real:
        templates = {alignment_setting(places.aligned(folder), "template") for folder in folders}
        real = real_faces(Path(config.scores.real), places.real_embeddings(config), scorer, templates)
    results = [score(folder, config, scorer, *real) for folder in dict.fromkeys(folders)]

    # the paper's rows beside ours, and how images vary; one plot
    together = places.around(folders) if config.scores.overlay else folders[0]
    target = places.scores(together, config)
    table, of_variety = score_table(results), variety_table(results)
    if config.scores.overlay:
        write_text(target / "table.md", table)
        write_text(target / "variety.md", of_variety)
        if (figure := plot_faces(folders)) is not None:
            save_figure(figure, target / "faces.png")
    save_figure(plot_scores(results), target / "distributions.png")
    print(table, of_variety, sep="\n")
    for folder in folders:
        write_cards(folder)  # with these figures
    for result in results:
        a, b, cosine = result.metrics["most_similar_identities"]
        print(f"{result.run.name}: most similar identities {a} and {b}, cosine of their means {cosine:.3f}")
    print(f"written to {target}")


def score(run: Path, config: Config, scorer: Scorer, real: variety.Halves | None, real_digest: str) -> Scored:
    """The scores of a run; those already there are read where they are of the same faces."""
    settings, folder, aligned = config.scores, places.scores(run, config), places.aligned(run)
    kept = select(read_kept(aligned), settings.identities, settings.images_per_identity)
    decides = scorer.decides(kept, alignment_setting(aligned, "template"))
    if noted(places.alignment_record(aligned), "selected_by") == scorer.digest:
        raise UserError(f"scores.recogniser: has selected the faces of {aligned} (align.band), and what it selects it cannot "
                        "judge; give another")
    record = Record(folder / "scores.json", {**decides, "replicates": REPLICATES, "scores.real": real_digest},
                    target=folder / "metrics.json")
    with record.making(folder / "embeddings.npz", folder / "histograms.npz", config=asdict(config)) as is_new:
        if is_new:
            labels = np.repeat(list(kept), [len(images) for images in kept.values()])
            announce("scores", len(labels), "faces", folder, FACE_SIZE + HISTOGRAMS_SIZE / len(labels), files=5)
            embeddings = scorer.embeddings(kept, decides, folder / "embeddings.npz")
            measure(folder, embeddings, labels, real, REPLICATES, scorer.device)
        note(record.file, kept=noted(places.alignment_record(aligned), "kept"))
        return Scored(run, folder, read_distributions(folder / "histograms.npz"), read_json(folder / "metrics.json"))


if __name__ == "__main__":
    run_script(main)
