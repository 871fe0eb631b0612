"""What the generator draws of people who were held out: told apart, varied, like real faces, women and men alike?

Reads   training.faces, training.held_out, contexts.recogniser (these people and their contexts), the generator and its settings,
        scores.recogniser: another one; --labelled: faces with <folder>_labels.csv beside them (UTKFace), to tell women from men
Writes  <output>/held-out/<paths.run>/: a run without a negative context and one for each strategy, their scores, held_out.md
        <output>/faces/<folders>/: where the real faces lie, cached; with --docs the tables in docs/results.md, README and the
        card

    python -m experiments.held_out align.minimum_face=30 scores.recogniser=data/mobilefacenet_independent.ncnn.param \\
        training.faces=data/lfw/lfw-deepfunneled,data/celeba_10k training.held_out=models/demo/held_out.txt

Of each folder's people those who choose the checkpoint are left out. On all others, IMAGES each, strategies are compared, women
with men, and generated faces with real ones.
"""
import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from config import places
from config.config import Config
from config.load import load_config
from experiments import documents
from experiments.demo import STRATEGIES, stage
from experiments.options import parse
from experiments.training_set import DESCRIBED, labels_beside, middle
from models.published import backbone_digest, load_backbone
from train_diffusion import VALIDATION_IDENTITIES
from utils.evaluation import attributes, scores, variety
from utils.evaluation.tables import markdown, span
from utils.faces.aligned import alignment_setting, read_kept
from utils.faces.images import read_image
from utils.faces.template import ARCFACE, warp
from utils.identities import contexts as identity_contexts
from utils.recognition.embedding import embed
from utils.recognition.scorer import Scorer
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import write_text
from utils.runtime.ranks import Ranks
from utils.training import faces as training_faces
from utils.training.faces import TrainingFaces, some

IMAGES = 8  # of each person, that strategies are compared on
AGAINST_REAL = 2000  # faces drawn of each folder's people, at least; of these as many as half of the real ones are compared
MORE = "w0-more"  # faces beyond IMAGES for it, from other noise: strategies are compared on the same noise
REPLICATES = 1000
SUMMARIES = ("README.md", "models/demo/CARD.md")  # which show less than docs/results.md


@dataclass(frozen=True)
class People:
    """Held-out people who chose no checkpoint, those of one folder and of another in turn."""

    names: list[str]  # of their contexts, in whose order they are sampled
    sources: np.ndarray  # [P], the folder of each
    contexts: np.ndarray  # [P, D] float32, of each one's first face
    rows: list[np.ndarray]  # of each one's faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled", default="data/utkface", help="faces whose labels lie beside them")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/ too")
    options, given = parse(parser)
    config = load_config(__doc__, arguments=given)
    ranks = distributed.setup(config.device)
    variety.require_prdc()
    labels = labels_beside([options.labelled])
    if not labels:
        raise UserError(f"--labelled: there is no {options.labelled}_labels.csv; give a folder of faces that has one beside it")

    # the people, their contexts and real faces
    recogniser, scorer = (load_backbone(file) for file in (config.contexts.recogniser, config.scores.recogniser))
    faces, known = (real_faces(config, roots, ranks) for roots in (config.training.faces, (options.labelled,)))
    people = held_out_people(faces, config.training.held_out, partial(embeddings, recogniser, ranks.device, faces))
    is_woman = women(partial(embeddings, recogniser, ranks.device, shown=middle), known, labels, faces, people)
    real = embeddings(scorer, ranks.device, faces, np.concatenate(people.rows))

    # their images
    name = f"held-out/{config.paths.run or 'demo'}"
    folder = Path(config.paths.output) / name
    file = folder / "contexts.npz"
    identity_contexts.write(file, people.names, people.contexts)
    fewest = min(np.unique(people.sources, return_counts=True)[1])
    more, runs = max(1, -(-AGAINST_REAL // fewest) - IMAGES), {}
    for strategy in ("w0", MORE, *STRATEGIES):
        is_guided = strategy in STRATEGIES
        own = [*given, f"sampling.seed={config.sampling.seed + (strategy == MORE)}",
               "contexts.source=published", f"contexts.file={file}", f"contexts.name={name.replace('/', '-')}",
               f"paths.run={name}/{strategy}", f"sampling.identities={len(people.names)}",
               f"sampling.images_per_identity={more if strategy == MORE else IMAGES}",
               f"negatives.strategy={strategy}" if is_guided else "guidance.w=0"]
        for script in ("create_sample_identity_contexts", *["create_negative_contexts"] * is_guided, "sample", "align"):
            stage(script, *own)
        runs[strategy] = folder / strategy
    stage("plot_distributions", *given, f"scores.overlay={','.join(f'{name}/{run}' for run in runs if run != MORE)}",
          f"scores.identities={len(people.names)}", f"scores.images_per_identity={IMAGES}")

    # all of these that all people have
    of_scores = Scorer(scorer, backbone_digest(config.scores.recogniser), ranks.device)
    drawn = {run: drawn_embeddings(runs[run], config, of_scores) for run in ("w0", MORE, "far")}
    with_more = [np.concatenate(both) for both in zip(drawn["w0"], drawn.pop(MORE), strict=True)]
    table = (places.scores(folder, config) / "table.md").read_text(encoding="utf-8")
    text = "\n".join([
        table,
        (places.scores(folder, config) / "variety.md").read_text(encoding="utf-8"),
        table_of_sexes(drawn, dict(zip(people.names, is_woman, strict=True))),
        table_against_real(*with_more, people, real),
        f"Faces detected: {detected(runs.values())}.\n"])
    write_text(folder / "held_out.md", text)
    if options.docs:
        documents.write_between("docs/results.md", "held_out", text)
        for document in SUMMARIES:
            documents.write_between(document, "held_out", summary(table))
    print(f"\n{text}\nwritten to {folder / 'held_out.md'}")


def real_faces(config: Config, roots: tuple[str, ...], ranks: Ranks) -> TrainingFaces:
    return training_faces.prepare(roots, "", False, config.align.minimum_face / 128, places.face_cache(config, roots), ranks)


def embeddings(recogniser: torch.nn.Module, device: torch.device, faces: TrainingFaces, rows: np.ndarray,
               shown: Callable[[np.ndarray], np.ndarray] = lambda face: face) -> np.ndarray:
    """Unit embeddings [N, D] of some of the faces, aligned; `shown`: what of a face [112, 112, 3] the recogniser is shown."""
    return identity_contexts.normalise(embed(recogniser, rows, device, read=lambda row: shown(
        warp(read_image(faces.files[row]), faces.landmarks[row], ARCFACE))))


def held_out_people(faces: TrainingFaces, names: str, contexts_of: Callable[[np.ndarray], np.ndarray]) -> People:
    """The people held out by training.held_out, those of each folder who choose the checkpoint left out.

    Args:
        contexts_of: rows of faces [P] -> their contexts [P, D].
    """
    _, _, chosen = training_faces.hold_out(faces, names)
    sources = np.array([faces.identities[number].rpartition("/")[0] for number in chosen])
    of_source = {source: chosen[sources == source][VALIDATION_IDENTITIES:] for source in np.unique(sources)}
    # each folder's evenly between those of the others
    ordered = sorted((place / len(own), source, number) for source, own in of_source.items() for place, number in enumerate(own))
    if len(ordered) < 2:
        raise UserError(f"training.held_out: leaves {len(ordered)} people besides the first {VALIDATION_IDENTITIES} of each "
                        "folder, who choose the checkpoint; hold out more")
    rows = [np.flatnonzero(faces.labels == number) for _, _, number in ordered]
    return People([f"{place:04d}-{faces.identities[number].replace('/', '-')}" for place, (_, _, number) in enumerate(ordered)],
                  np.array([source for _, source, _ in ordered]), contexts_of(np.array([own[0] for own in rows])), rows)


def women(of: Callable[[TrainingFaces, np.ndarray], np.ndarray], known: TrainingFaces, labels: Mapping[str, Mapping[str, str]],
          faces: TrainingFaces, people: People) -> np.ndarray:
    """Who is a woman [P] bool, estimated from the middle of all of a person's faces; experiments/training_set.py.

    Args:
        of: some of the faces -> unit embeddings [N, D] of their middle.
        known, labels: faces, of which some have labels.
    """
    chosen = some(np.array([row for row, file in enumerate(known.files) if str(file.with_suffix("")) in labels]), DESCRIBED)
    own = [labels[str(known.files[row].with_suffix(""))]["sex"] for row in chosen]
    (sex,) = attributes.fit(of(known, chosen), {"sex": own})
    of_face = sex.classifier.predict_log_proba(of(faces, np.concatenate(people.rows)))
    starts = np.cumsum([0, *map(len, people.rows[:-1])])
    likeliest = np.add.reduceat(of_face, starts, axis=0).argmax(axis=1)
    return sex.classifier.classes_[likeliest] == "female"


def drawn_embeddings(run: Path, config: Config, scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, D] of a run's kept faces and the identity of each [N]."""
    aligned = places.aligned(run)
    kept = read_kept(aligned)
    decides = scorer.decides(kept, alignment_setting(aligned, "template"))
    found = scorer.embeddings(kept, decides, places.all_embeddings(run, config))
    return found, np.repeat(list(kept), [len(images) for images in kept.values()])


def table_of_sexes(drawn: dict[str, tuple[np.ndarray, np.ndarray]], is_woman: dict[str, bool]) -> str:
    """FDR of women among women and of men among men, from the first IMAGES of each, with and without Far."""
    rows = []
    for sex, wanted in (("women", True), ("men", False)):
        cells, resampled = [], {}
        people = [name for name, one in is_woman.items() if one == wanted and all(name in labels for _, labels in drawn.values())]
        if len(people) < 2:  # nobody to be told apart from
            continue
        for run, (found, labels) in drawn.items():
            place = np.arange(len(labels)) - np.searchsorted(labels, labels)
            chosen = np.isin(labels, people) & (place < IMAGES)
            own = found[chosen], labels[chosen]
            value = scores.metrics(scores.score_distributions(*own))["fdr"]
            resampled[run] = value, scores.bootstrap(*own, REPLICATES)["fdr"]
            cells.append(f"{value:.3f}{span(scores.interval(resampled[run][1]), 2)}")
        (base, bases), (value, values) = resampled["w0"], resampled["far"]
        rows.append([sex, str(len(people)), *cells,
                     f"{value / base:.2f}{span(scores.interval(values / bases), 2)}"])
    return markdown(("", "people", *(f"FDR, {run}" for run in drawn), "FDR ratio"), rows)


def table_against_real(drawn: np.ndarray, labels: np.ndarray, people: People, real: np.ndarray) -> str:
    """Coverage, recall and Frechet distance of what is drawn with w = 0, for each folder's people and for all of them; the
    distance also without what few faces add to it, from all there are.

    Args:
        drawn, labels: embeddings [N, D], and the name of each one's person [N].
        real: embeddings [M, D] of the people's faces, in the order of people.rows.
    """
    owners = np.repeat(np.arange(len(people.rows)), [len(own) for own in people.rows])
    # numbered folder by folder: every other person of each is in one half (the people come from one and another in turn)
    numbers = np.argsort(np.argsort(people.sources, kind="stable"))
    source_of, rows = dict(zip(people.names, people.sources, strict=True)), []
    of_label, every = np.array([source_of[name] for name in labels]), sorted(set(people.sources))
    for name, sources in [*((source or "all", [source]) for source in every), *[("all", every)] * (len(every) > 1)]:
        chosen = np.isin(of_label, sources)
        own = np.isin(people.sources[owners], sources)
        halves = variety.halves(real[own], numbers[owners[own]])
        figures, of_halves = variety.against_real(drawn[chosen], labels[chosen], halves)
        # of which the photographs' halves are too few in a single folder
        unlimited = [f"{variety.unlimited_frechet_distance(*sets):.3f}" for sets in ((drawn[chosen], real[own]), halves)
                     if min(map(len, sets)) >= 2 * real.shape[1]]
        rows.append([name, f"{chosen.sum():,}", f"{own.sum():,}", *(
            f"{figures[one]:.3f}" + (span(variety.half_sample_interval(figures[one], of_halves[one]), 3) if of_halves else "")
            + f", real {figures[f'real_{one}']:.3f}" for one in variety.AGAINST_REAL), ", real ".join(unlimited)])
    return markdown(("held-out people of", "generated", "real faces", "coverage", "recall", "Frechet distance",
                     "of unlimited numbers"), rows)


def summary(table: str) -> str:
    """EER, FDR and its ratio of each run, the paper's beside them: of a score_table, where they have their own rows."""
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    ours = [name for name in cells if not name.startswith("paper: ")]
    papers = dict(zip(ours, [cells[name] for name in cells if name not in ours], strict=True))
    return markdown(("negative", "EER", "FDR", "ratio", "paper: FDR", "paper: ratio"), [
        ["none (w = 0)" if name == "w0" else name, *(cells[name][column] for column in ("EER", "FDR", "FDR ratio")),
         *(papers[name][column] for column in ("FDR", "FDR ratio"))] for name in ours])


def detected(runs: Iterable[Path]) -> str:
    """How many of the runs' images a face was found in."""
    runs = list(runs)
    found, drawn = (sum(len(list(folder(run).glob("*/*.png"))) for run in runs) for folder in (places.aligned, places.samples))
    return f"{found:,} of {drawn:,} ({found / drawn:.2%})"


if __name__ == "__main__":
    run_script(main)
