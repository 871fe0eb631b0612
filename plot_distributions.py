"""Stage 5: how alike are images of one identity, how alike those of two, and how do they vary? Score distributions.

Reads   <run>/aligned/ (stage 4), a recogniser other than the one that made the contexts, real faces (scores.real)
Writes  <run>/scores/<recogniser>/: embeddings.npz, histograms.npz, metrics.json, distributions.png
        the figures in the dataset cards of samples and aligned faces
        with scores.overlay: <folder of its runs>/scores/<recogniser>/distributions.png, table.md, variety.md and faces.png
        (the same identities in every run)
        <output>/faces/: the embeddings of the real faces, cached

    python plot_distributions.py scores.recogniser=data/published/ElasticCos.pth
    python plot_distributions.py scores.recogniser=... scores.overlay=demo/baseline,demo/far scores.real=output/lfw/aligned
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config import places
from config.config import Config
from config.load import load_config
from models.published import backbone_digest, load_backbone
from utils.evaluation import scores, variety
from utils.faces.aligned import read_kept
from utils.faces.dataset_card import write_cards
from utils.faces.folders import image_folders, listing, select
from utils.recognition.embedding import embed
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import montage, save_figure
from utils.runtime.files import read_json, read_npz, write_json, write_npz, write_text
from utils.runtime.progress import announce
from utils.runtime.records import Record, decided, versions

# NegFaceDiff (arXiv 2508.09661), its table of score distributions:
# EER, FMR100, FMR1000, genuine mean and standard deviation, impostor mean and standard deviation, FDR.
COLUMNS = ("eer", "fmr100", "fmr1000", "genuine_mean", "genuine_std", "impostor_mean", "impostor_std", "fdr")
PAPER = {
    "CASIA-WebFace, real": (.076, .092, .107, .536, .215, .003, .070, 5.541),
    "LFW, real": (.002, .002, .002, .708, .099, .003, .070, 33.301),
    "w = 0": (.130, .385, .607, .226, .117, .014, .070, 2.427),
    "null": (.034, .066, .158, .377, .127, .023, .060, 6.361),
    "close": (.043, .094, .208, .345, .129, .020, .059, 5.280),
    "rand": (.040, .085, .194, .354, .129, .020, .059, 5.513),
    "mid": (.041, .083, .186, .355, .130, .019, .059, 5.526),
    "far": (.039, .078, .179, .361, .131, .019, .059, 5.687),
}
VARIETY = {"genuine_mean": "genuine mean", "genuine_std": "genuine std", "impostor_mean": "impostor mean",
           "impostor_std": "impostor std", "vendi": "Vendi score", "distance": "distance", "coverage": "coverage",
           "recall": "recall", "frechet": "Frechet distance"}
PLOTTED = ("genuine_std", "vendi", "distance", *variety.AGAINST_REAL)
FEW_PAIRS = 10_000  # a run of fewer genuine pairs is plotted in wider bins, which would else be all spikes
FACES = (4, 6)  # identities and images of each in the picture of all runs
REPLICATES = 1000  # of the identities, for the 90% intervals
BOOTSTRAP_IDENTITIES = 1000  # at most: the paper's subset; resampling takes time with their square
FACE_SIZE, HISTOGRAMS_SIZE = 3000, 3.3e6  # bytes: a face's embedding (512-d) and path; two histograms
ALIGN = "run align.py with another paths.run, which writes that record too"
LFW_FOLDERS = ("lfw", "lfw-deepfunneled", "lfw_funneled")  # what LFW is called where it is unpacked


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
    real = real_faces(config, scorer) if config.scores.real else None
    results = {folder: score(folder, config, scorer, real) for folder in folders}

    # the paper's rows beside ours, and how images vary; one plot
    together = Path(os.path.commonpath([folder.parent for folder in folders])) if config.scores.overlay else folders[0]
    target = places.scores(together, config)
    table, of_variety = markdown_table(results, config), variety_table(results)
    if config.scores.overlay:
        write_text(target / "table.md", table)
        write_text(target / "variety.md", of_variety)
        if (figure := plot_faces(folders)) is not None:
            save_figure(figure, target / "faces.png")
    save_figure(plot(results), target / "distributions.png")
    print(table, of_variety, sep="\n")
    for folder in folders:
        write_cards(folder)  # with these figures
    for folder, (_, metrics) in results.items():
        a, b, cosine = metrics["most_similar_identities"]
        print(f"{folder.name}: most similar identities {a} and {b}, cosine of their means {cosine:.3f}")
    print(f"written to {target}")


@dataclass(frozen=True)
class Scorer:
    """The recogniser that scores, and what is made by it."""

    backbone: torch.nn.Module
    digest: str
    device: torch.device

    def decides(self, faces: Mapping[str, Sequence[Path]], template: str) -> dict[str, str]:
        """What decides the embeddings of aligned faces."""
        return {"scores.recogniser": self.digest, "template": template, "faces": listing(faces)}

    def embeddings(self, faces: Mapping[str, Sequence[Path]], decides: Mapping[str, str], file: Path) -> np.ndarray:
        """[N, D] float32 of the faces in their order; those in the file are read where they are of the same faces."""
        with Record(file.with_suffix(".json"), decides, target=file).making() as is_new:
            if not is_new:
                return read_npz(file, ("embeddings",))["embeddings"]
            images = [face for images in faces.values() for face in images]
            embeddings = embed(self.backbone, images, self.device, decides["template"])
            write_npz(file, embeddings=embeddings, paths=np.array([f"{face.parent.name}/{face.name}" for face in images]))
            return embeddings


@dataclass(frozen=True)
class RealFaces:
    halves: tuple[np.ndarray, np.ndarray]  # unit embeddings [M, D] of every other identity
    listing: str  # digest


def real_faces(config: Config, scorer: Scorer) -> RealFaces:
    """The real faces of scores.real: those that align.py kept or, without its record, any 112 x 112 ones.

    Raises:
        UserError: there is no such folder, a face is of another size, or there is one identity only.
    """
    folder, template = Path(config.scores.real), "arcface"
    if places.alignment_record(folder).is_file():
        faces = read_kept(folder)
        template = decided(places.alignment_record(folder), ("align.template",), ALIGN)["align.template"]
    else:
        faces = image_folders(folder)
    faces = at_most(faces, 2 * variety.MOST_FACES)
    decides = scorer.decides(faces, template)
    embeddings = scorer.embeddings(faces, decides, places.real_embeddings(config))
    labels = np.repeat(list(faces), [len(images) for images in faces.values()])
    return RealFaces(variety.halves(embeddings, labels), decides["faces"])


def at_most(faces: Mapping[str, Sequence[Path]], number: int) -> dict[str, list[Path]]:
    """`number` of the faces, evenly spread over the identities; all of them where there are no more."""
    files = [(identity, file) for identity, images in faces.items() for file in images]
    chosen: dict[str, list[Path]] = {}
    for row in variety.spread(len(files), min(number, len(files))):
        chosen.setdefault(files[row][0], []).append(files[row][1])
    return chosen


def score(run: Path, config: Config, scorer: Scorer, real: RealFaces | None) -> tuple[scores.ScoreDistributions, dict]:
    """The distributions and metrics of a run; those already there are read where they are of the same faces."""
    settings, folder, aligned = config.scores, places.scores(run, config), places.aligned(run)
    kept = select(read_kept(aligned), settings.identities, settings.images_per_identity)
    template = decided(places.alignment_record(aligned), ("align.template",), ALIGN)["align.template"]
    decides = scorer.decides(kept, template)
    record = Record(folder / "scores.json", {**decides, "replicates": REPLICATES, "scores.real": real.listing if real else ""},
                    target=folder / "metrics.json")
    with record.making(folder / "embeddings.npz", folder / "histograms.npz", config=asdict(config)) as is_new:
        if is_new:
            measure(kept, decides, folder, scorer, real)
        return scores.read_distributions(folder / "histograms.npz"), read_json(folder / "metrics.json")


def measure(kept: Mapping[str, Sequence[Path]], decides: Mapping[str, str], folder: Path, scorer: Scorer,
            real: RealFaces | None) -> None:
    """Write what there is to say of the faces of a run into a folder."""
    labels = np.repeat(list(kept), [len(images) for images in kept.values()])
    announce("scores", len(labels), "faces", folder, FACE_SIZE + HISTOGRAMS_SIZE / len(labels), files=5)
    embeddings = scorer.embeddings(kept, decides, folder / "embeddings.npz")
    distributions = scores.score_distributions(embeddings, labels, scorer.device)
    within, images_each = variety.within_identity(embeddings, labels)
    metrics = scores.metrics(distributions) | {name: float(np.nanmean(values)) for name, values in within.items()}
    metrics |= {"vendi_images": images_each, "identities": len(kept), "images": len(labels), "versions": versions(),
                "most_similar_identities": scores.most_similar_identities(embeddings, labels, scorer.device)}
    left_out = {}
    if real:
        figures, left_out = variety.against_real(embeddings, labels, real.halves)
        metrics |= figures
    replicates = {}
    if len(kept) >= scores.MIN_BOOTSTRAP_IDENTITIES:
        replicates = {name: variety.resampled_mean(values, REPLICATES) for name, values in within.items()}
        if len(kept) <= BOOTSTRAP_IDENTITIES:
            replicates |= scores.bootstrap(embeddings, labels, REPLICATES, device=scorer.device)
            write_npz(folder / "bootstrap.npz", identities=np.unique(labels), **replicates,
                      **{f"left_out_{name}": values for name, values in left_out.items()})
        metrics["intervals"] = {name: scores.interval(values) for name, values in replicates.items()} | {
            name: variety.jackknife_interval(metrics[name], values) for name, values in left_out.items()}
    scores.write_distributions(folder / "histograms.npz", distributions)
    write_json(folder / "metrics.json", metrics)  # last: where it exists, all of them do


def kind(run: Path) -> str | None:
    """The row of the paper's table that a run corresponds to, by the run's records; None where there is none."""
    if not places.run_record(run).is_file():
        images = decided(places.alignment_record(places.aligned(run)), ("align.images",), ALIGN)["align.images"]
        return "LFW, real" if Path(images).name in LFW_FOLDERS else None
    try:
        record = read_json(places.run_record(run))
        settings, decides = record["config"], record.get("decides", {})
        guidance, strategy = settings["guidance"], settings["negatives"]["strategy"]
        rule = guidance.get("rule", "negative"), guidance["w"], guidance["schedule"]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{places.run_record(run)}: does not say how the run was guided; restore it, or sample again under "
                        "another paths.run") from None
    if any(name.startswith("variety.") for name in decides):  # which the paper has none of
        return None
    if guidance["w"] == 0:
        return "w = 0"
    return strategy if strategy in PAPER and rule == ("negative", 0.5, "constant") else None


def markdown_table(results: dict[Path, tuple[scores.ScoreDistributions, dict]], config: Config) -> str:
    """Each run's metrics (with 90% intervals where there are any), below it the paper's row of its kind.

    The last column is the FDR divided by that of the first run.
    """
    lines = ["| images | EER | FMR100 | FMR1000 | genuine mean/std | impostor mean/std | FDR | pairs | FDR ratio |",
             "|---|---|---|---|---|---|---|---|---|"]
    first = next(iter(results))
    for run, (_, metrics) in results.items():
        values = [metrics[name] for name in COLUMNS]
        intervals = metrics.get("intervals", {})
        ratio = "" if run is first else f"{metrics['fdr'] / results[first][1]['fdr']:.2f}"
        has_intervals = intervals and results[first][1].get("intervals")
        if ratio and has_intervals and (limits := ratio_interval(places.scores(first, config), places.scores(run, config))):
            ratio += " ({:.2f} to {:.2f})".format(*limits)
        lines.append(_row(run.name, values, f"{metrics['genuine_pairs']:,} + {metrics['impostor_pairs']:,}", ratio,
                          intervals.get("eer"), intervals.get("fdr")))
        if kind(run):
            both_known = kind(first) and run is not first
            ratio = f"{PAPER[kind(run)][-1] / PAPER[kind(first)][-1]:.2f}" if both_known else ""
            lines.append(_row(f"paper: {kind(run)}", PAPER[kind(run)], "", ratio))
    return "\n".join(lines) + "\n"


def ratio_interval(first: Path, run: Path) -> tuple[float, float] | None:
    """The 90% interval of the FDR of scores over that of the first ones, if both are of the same identities."""
    files = [folder / "bootstrap.npz" for folder in (first, run)]
    if not all(file.is_file() for file in files):
        return None
    a, b = (read_npz(file, ("identities", "fdr")) for file in files)
    if not np.array_equal(a["identities"], b["identities"]) or a["fdr"].shape != b["fdr"].shape:
        return None
    return scores.interval(b["fdr"] / a["fdr"])


def _row(name: str, values: Sequence[float], pairs: str, ratio: str, eer_interval: Sequence[float] | None = None,
         fdr_interval: Sequence[float] | None = None) -> str:
    eer, fmr100, fmr1000, genuine_mean, genuine_std, impostor_mean, impostor_std, fdr = values
    eer_range = " ({:.4f} to {:.4f})".format(*eer_interval) if eer_interval else ""
    fdr_range = " ({:.2f} to {:.2f})".format(*fdr_interval) if fdr_interval else ""
    return (f"| {name} | {eer:.4f}{eer_range} | {fmr100:.4f} | {fmr1000:.4f} | {genuine_mean:.3f} / {genuine_std:.3f} | "
            f"{impostor_mean:.3f} / {impostor_std:.3f} | {fdr:.3f}{fdr_range} | {pairs} | {ratio} |")


def variety_table(results: dict[Path, tuple[scores.ScoreDistributions, dict]]) -> str:
    """Each run's figures of VARIETY with 90% intervals; last, where real faces were given, what other real faces have."""
    all_metrics = [metrics for _, metrics in results.values()]
    names = [name for name in VARIETY if name in all_metrics[0]]
    lines = ["| images | " + " | ".join(VARIETY[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for run, metrics in zip(results, all_metrics, strict=True):
        cells = []
        for name in names:
            limits = metrics.get("intervals", {}).get(name)
            cells.append(f"{metrics[name]:.3f}" + (" ({:.3f} to {:.3f})".format(*limits) if limits else "")
                         + (f" of {metrics['vendi_images']}" if name == "vendi" else ""))
        lines.append(f"| {run.name} | " + " | ".join(cells) + " |")
    for count in sorted({metrics["real_faces"] for metrics in all_metrics if "real_faces" in metrics}):
        metrics = next(metrics for metrics in all_metrics if metrics["real_faces"] == count)
        cells = [f"{metrics[f'real_{name}']:.3f}" if f"real_{name}" in metrics else "" for name in names]
        lines.append(f"| real faces against others, {count:,} each | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[Path, tuple[scores.ScoreDistributions, dict]]) -> Figure:
    """Genuine (filled) and impostor (dashed) densities of every run, one colour each; below them how its images vary."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4.5, 2))
    axes = above.subplots()
    fewest = min(metrics["genuine_pairs"] for _, metrics in results.values())
    bins = 50 if fewest < FEW_PAIRS else 200
    edges = np.linspace(-1, 1, bins + 1)
    for number, (run, (distributions, metrics)) in enumerate(results.items()):
        genuine, impostor = (counts.reshape(bins, -1).sum(axis=1) / counts.sum() * bins / 2
                             for counts in (distributions.genuine_counts, distributions.impostor_counts))
        color = f"C{number}"
        axes.stairs(genuine, edges, color=color, fill=True, alpha=0.1)
        axes.stairs(genuine, edges, color=color, linewidth=1.5, label=f"{run.name}: FDR {metrics['fdr']:.2f}")
        axes.stairs(impostor, edges, color=color, linestyle="--")
    axes.set(xlabel="cosine similarity", ylabel="density", xlim=(-0.5, 1),
             title="genuine (filled) and impostor (dashed) scores")
    axes.legend(fontsize="small")
    all_metrics = [metrics for _, metrics in results.values()]
    names = [name for name in PLOTTED if name in all_metrics[0]]
    for axes, name in zip(below.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _plot_figure(axes, name, all_metrics)
    return figure


def _plot_figure(axes: Axes, name: str, all_metrics: Sequence[dict]) -> None:
    """One figure of every run with its interval; dotted, what real faces have."""
    for number, metrics in enumerate(all_metrics):
        limits = metrics.get("intervals", {}).get(name, (metrics[name],) * 2)
        axes.vlines(number, *limits, color=f"C{number}")
        axes.plot(number, metrics[name], "o", color=f"C{number}", markersize=4)
        if f"real_{name}" in metrics:
            axes.axhline(metrics[f"real_{name}"], color="black", linestyle=":", linewidth=1)
    counts = {metrics["vendi_images"] for metrics in all_metrics}
    of = f" of {counts.pop()}" if name == "vendi" and len(counts) == 1 else ""
    axes.set_title(f"{VARIETY[name]}{of}", fontsize="small")
    axes.set(xticks=[], xlim=(-0.5, len(all_metrics) - 0.5))
    axes.tick_params(labelsize="small")


def plot_faces(folders: Sequence[Path]) -> Figure | None:
    """A panel for each run: a row for each of the first identities, the same ones in every panel; None if none is shared."""
    kept = [read_kept(places.aligned(folder)) for folder in folders]
    names = sorted(set(kept[0]).intersection(*kept))[:FACES[0]]
    if not names:
        return None
    columns = math.ceil(len(folders) / 2) if len(folders) > 3 else len(folders)
    figure = Figure(figsize=(4 * columns, 3.2 * math.ceil(len(folders) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(folders) / columns), columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, folder, faces in zip(panels, folders, kept, strict=False):
        axes.imshow(montage([faces[name][: FACES[1]] for name in names], FACES[1]))
        axes.set_title(folder.name)
    return figure


if __name__ == "__main__":
    run_script(main)
