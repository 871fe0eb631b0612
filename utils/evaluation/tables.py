"""What was measured as Markdown tables, the paper's rows beside ours."""
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.evaluation import all_pairs
from utils.evaluation.measures import Scored, ratio_interval
from utils.evaluation.paper import FAR, SCORE_COLUMNS, SCORES, VERIFICATION, VERIFICATION_COLUMNS, score_row
from utils.evaluation.verification import BENCHMARKS

VARIETY = {"genuine_mean": "genuine mean", "genuine_std": "genuine std", "impostor_mean": "impostor mean",
           "impostor_std": "impostor std", "vendi": "Vendi score", "distance": "distance", "coverage": "coverage",
           "recall": "recall", "frechet": "Frechet distance"}
VERIFIED = (*BENCHMARKS, "mean", *FAR)


# ---- stage 5 ---------------------------------------------------------------------------------------------------------

def score_table(results: Sequence[Scored]) -> str:
    """Each run's metrics (with 90% intervals where there are any), below it the paper's row of its kind.

    The last column is the FDR divided by that of the first run.
    """
    lines = ["| images | EER | FMR100 | FMR1000 | genuine mean/std | impostor mean/std | FDR | pairs | FDR ratio |",
             "|---|---|---|---|---|---|---|---|---|"]
    first = results[0]
    for result in results:
        metrics, intervals = result.metrics, result.metrics.get("intervals", {})
        ratio = "" if result is first else f"{metrics['fdr'] / first.metrics['fdr']:.2f}"
        has_intervals = intervals and first.metrics.get("intervals")
        if ratio and has_intervals and (limits := ratio_interval(first.folder, result.folder)):
            ratio += " ({:.2f} to {:.2f})".format(*limits)
        lines.append(_row(result.run.name, [metrics[name] for name in SCORE_COLUMNS],
                          f"{metrics['genuine_pairs']:,} + {metrics['impostor_pairs']:,}", ratio, intervals.get("eer"),
                          intervals.get("fdr")))
        if row := score_row(result.run):
            base = score_row(first.run) if result is not first else None
            ratio = f"{SCORES[row][-1] / SCORES[base][-1]:.2f}" if base else ""
            lines.append(_row(f"paper: {row}", SCORES[row], "", ratio))
    return "\n".join(lines) + "\n"


def _row(name: str, values: Sequence[float], pairs: str, ratio: str, eer_interval: Sequence[float] | None = None,
         fdr_interval: Sequence[float] | None = None) -> str:
    eer, fmr100, fmr1000, genuine_mean, genuine_std, impostor_mean, impostor_std, fdr = values
    eer_range = " ({:.4f} to {:.4f})".format(*eer_interval) if eer_interval else ""
    fdr_range = " ({:.2f} to {:.2f})".format(*fdr_interval) if fdr_interval else ""
    return (f"| {name} | {eer:.4f}{eer_range} | {fmr100:.4f} | {fmr1000:.4f} | {genuine_mean:.3f} / {genuine_std:.3f} | "
            f"{impostor_mean:.3f} / {impostor_std:.3f} | {fdr:.3f}{fdr_range} | {pairs} | {ratio} |")


def variety_table(results: Sequence[Scored]) -> str:
    """Each run's figures of VARIETY with 90% intervals; last, where real faces were given, what other real faces have."""
    names = [name for name in VARIETY if name in results[0].metrics]
    lines = ["| images | " + " | ".join(VARIETY[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    real = {}
    for result in results:
        cells, metrics = [], result.metrics
        for name in names:
            limits = metrics.get("intervals", {}).get(name)
            cells.append(f"{metrics[name]:.3f}" + (" ({:.3f} to {:.3f})".format(*limits) if limits else "")
                         + (f" of {metrics['vendi_images']}" if name == "vendi" else ""))
        lines.append(f"| {result.run.name} | " + " | ".join(cells) + " |")
        if "real_faces" in metrics:
            real.setdefault(metrics["real_faces"], metrics)
    for count, metrics in sorted(real.items(), key=lambda item: item[0]):
        cells = [f"{metrics[f'real_{name}']:.3f}" if f"real_{name}" in metrics else "" for name in names]
        lines.append(f"| real faces against others, {count:,} each | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- stage 7 ---------------------------------------------------------------------------------------------------------

def verification_table(backbone: Path, percent: Mapping[str, float]) -> str:
    """The backbone's row above the paper's, in per cent."""
    def row(name: str, values: Sequence[float | None]) -> str:
        return f"| {name} | " + " | ".join("" if value is None else f"{value:.2f}" for value in values) + " |"

    columns = (*VERIFIED, *(name for name in percent if name not in VERIFIED))
    lines = ["| trained on | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines.append(row(f"this: {backbone.parent.name}/{backbone.name}", [percent.get(name) for name in columns]))
    lines += [row(f"paper: {name}", [dict(zip(VERIFICATION_COLUMNS, values, strict=True)).get(column) for column in columns])
              for name, values in VERIFICATION.items()]
    return "\n".join(lines) + "\n"


def all_pairs_table(results: Mapping[str, Mapping]) -> str:
    """TAR at FAR over all pairs, in per cent, with 90% intervals over identities; empty where the pairs do not suffice."""
    columns = [all_pairs.tar_name(far) for far in all_pairs.FAR]
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
