"""What was measured as Markdown tables, the paper's rows beside ours."""
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.evaluation.all_pairs import FAR, tar_name
from utils.evaluation.measures import Scored, ratio_interval
from utils.evaluation.paper import IJBC_FAR, SCORE_COLUMNS, SCORES, VERIFICATION, VERIFICATION_COLUMNS, score_row
from utils.evaluation.verification import BENCHMARKS

VARIETY = {"genuine_mean": "genuine mean", "genuine_std": "genuine std", "impostor_mean": "impostor mean",
           "impostor_std": "impostor std", "vendi": "Vendi score", "distance": "distance", "coverage": "coverage",
           "recall": "recall", "frechet": "Frechet distance"}
VERIFIED = (*BENCHMARKS, "mean", *IJBC_FAR)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(cells)} |\n" for cells in (columns, *rows))
    return "".join([head, "|---" * len(columns) + "|\n", *lines])


def span(limits: Sequence[float] | None, digits: int) -> str:
    """An interval behind its value; empty where there is none."""
    return " ({:.{n}f} to {:.{n}f})".format(*limits, n=digits) if limits else ""


def score_table(results: Sequence[Scored]) -> str:
    """Each run's metrics (with 90% intervals where there are any), below it the paper's row of its kind.

    The last column is the FDR divided by that of the first run.
    """
    first, rows = results[0], []
    for result in results:
        metrics, intervals, ratio = result.metrics, result.metrics.get("intervals", {}), ""
        if result is not first:
            limits = ratio_interval(first.folder, result.folder) if intervals and first.metrics.get("intervals") else None
            ratio = f"{metrics['fdr'] / first.metrics['fdr']:.2f}{span(limits, 2)}"
        rows.append(_cells(result.run.name, [metrics[name] for name in SCORE_COLUMNS],
                                 f"{metrics['genuine_pairs']:,} + {metrics['impostor_pairs']:,}", ratio, intervals))
        if row := score_row(result.run):
            base = score_row(first.run) if result is not first else None
            ratio = f"{SCORES[row][-1] / SCORES[base][-1]:.2f}" if base else ""
            rows.append(_cells(f"paper: {row}", SCORES[row], "", ratio, {}))
    return markdown(("images", "EER", "FMR100", "FMR1000", "genuine mean/std", "impostor mean/std", "FDR", "pairs", "FDR ratio"),
                    rows)


def _cells(name: str, values: Sequence[float], pairs: str, ratio: str, intervals: Mapping[str, Sequence[float]]) -> list[str]:
    eer, fmr100, fmr1000, genuine_mean, genuine_std, impostor_mean, impostor_std, fdr = values
    return [name, f"{eer:.4f}{span(intervals.get('eer'), 4)}", f"{fmr100:.4f}", f"{fmr1000:.4f}",
            f"{genuine_mean:.3f} / {genuine_std:.3f}", f"{impostor_mean:.3f} / {impostor_std:.3f}",
            f"{fdr:.3f}{span(intervals.get('fdr'), 2)}", pairs, ratio]


def variety_table(results: Sequence[Scored]) -> str:
    """Each run's figures of VARIETY with 90% intervals; last, where real faces were given, what other real faces have."""
    names = [name for name in VARIETY if name in results[0].metrics]
    rows, real = [], {}
    for result in results:
        metrics, intervals = result.metrics, result.metrics.get("intervals", {})
        rows.append([result.run.name, *(f"{metrics[name]:.3f}{span(intervals.get(name), 3)}"
                                        + (f" of {metrics['vendi_images']}" if name == "vendi" else "") for name in names)])
        if "real_faces" in metrics:
            real.setdefault(metrics["real_faces"], metrics)
    for count in sorted(real):
        rows.append([f"real faces against others, {count:,} each", *(
            f"{real[count][f'real_{name}']:.3f}" if f"real_{name}" in real[count] else "" for name in names)])
    return markdown(["images", *(VARIETY[name] for name in names)], rows)


def verification_table(backbone: Path, percent: Mapping[str, float]) -> str:
    """The backbone's row above the paper's, in per cent."""
    columns = (*VERIFIED, *(name for name in percent if name not in VERIFIED))
    rows = {f"this: {backbone.parent.name}/{backbone.name}": percent} | {
        f"paper: {name}": dict(zip(VERIFICATION_COLUMNS, values, strict=True)) for name, values in VERIFICATION.items()}
    return markdown(("trained on", *columns), [
        [name, *(f"{values[column]:.2f}" if column in values else "" for column in columns)] for name, values in rows.items()])


def all_pairs_table(results: Mapping[str, Mapping]) -> str:
    """TAR at FAR over all pairs, in per cent, with 90% intervals over identities; empty where the pairs do not suffice."""
    columns, rows = [tar_name(far) for far in FAR], []
    for name, result in results.items():
        per_cent = result["per_cent"]
        rows.append([name, f"{result['images']:,}", f"{result['identities']:,}",
                     f"{result['genuine_pairs']:,} + {result['impostor_pairs']:,}",
                     *(f"{per_cent[column]:.2f}{span(result['intervals'].get(column), 2)}" if column in per_cent else ""
                       for column in columns)])
    return markdown(("all pairs of", "images", "people", "genuine + impostor pairs", *columns), rows)
