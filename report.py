"""A page to look at: faces side by side, scores, metrics, failures, training, and how all of it was made.

Reads   runs: <run>/samples/, aligned/, scores/, fr/ as far as they are there (stages 3 to 7), and their records
Writes  report.html in the folder that the runs share (in the run's own where there is one): a single file, no network

    python report.py                                  # the run that the settings name
    python report.py demo/w0 demo/far                 # run folders, in paths.output or anywhere

The run without negative contexts (w = 0) comes first: the others are shown beside it.
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from config import places
from config.config import Config
from config.load import load_config
from utils.evaluation.measures import ratio_interval
from utils.evaluation.paper import SCORE_COLUMNS, SCORES, VERIFICATION, VERIFICATION_COLUMNS, score_row
from utils.evaluation.scores import read_distributions
from utils.evaluation.tables import VERIFIED
from utils.reporting import charts, sections
from utils.reporting.gathering import Run, number, stages, table
from utils.reporting.page import render
from utils.reporting.pictures import Pictures
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import read_json, write_text

SEPARATION = ("eer", "fmr100", "fmr1000", "impostor_mean", "impostor_std", "fdr", "ratio")
VARIETY = ("genuine_mean", "genuine_std")  # and whatever else there is in metrics.json but for
COUNTS = ("genuine_pairs", "impostor_pairs", "identities", "images", "vendi_images")
REAL = "real_"  # before the name of what real faces have


def main() -> None:
    given = list(zip(sys.argv, sys.argv[1:], strict=False))  # each with what stands before it
    names = [name for before, name in given if "=" not in name and not name.startswith("-") and before != "--preset"]
    sys.argv[1:] = [argument for before, argument in given if argument not in names or before == "--preset"]
    config = load_config(__doc__, reads=("paths", "scores"))
    folders = [find(name, config) for name in names or [os.path.relpath(places.run_folder(config), config.paths.output)]]
    together = places.around(folders) if len(folders) > 1 else folders[0]

    runs, pictures = read(folders, together, config), Pictures()
    scored = [run for run in runs if run.metrics]
    page = {"title": together.resolve().name, "runs": runs, "output": config.paths.output, "recogniser": config.scores.recogniser,
            "scores": charts.distributions([(run.name, run.number, read_distributions(
                places.scores(run.folder, config) / "histograms.npz")) for run in scored]) if scored else None,
            "metrics": metric_table(runs, config) if scored else None, "pairs": sections.similar_pairs(runs, pictures),
            "alignment": sections.alignment(runs, pictures), "training": sections.training(runs),
            "verification": verification_table(runs), "benchmarks": VERIFIED,
            "what_to_use": sections.WHAT_TO_USE} | sections.provenance(runs)
    page["faces"] = sections.faces(runs, pictures)  # last: they fill what the others leave
    target = places.report(together)
    write_text(target, render(page))
    print(f"{target}: written ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")


def find(name: str, config: Config) -> Path:
    """A run's folder by its name in paths.output, or as a path. Raises UserError where there is none."""
    for folder in (Path(config.paths.output) / name, Path(name)):
        if folder.is_dir():
            return folder
    raise UserError(f"{name}: is no run in {config.paths.output}; give the folder of a run, such as demo/far, or run sample.py "
                    f"paths.run={name}")


def read(folders: Sequence[Path], together: Path, config: Config) -> list[Run]:
    """The runs, those without a negative context first."""
    runs = []
    for folder in dict.fromkeys(folders):
        file = places.scores(folder, config) / "metrics.json"
        name = os.path.relpath(folder, together) if folder != together else folder.name
        runs.append((name, folder, stages(folder, config), table(read_json(file)) if file.is_file() else {}))
    runs.sort(key=lambda run: not Run("", 0, *run[1:]).unguided)
    return [Run(name, place, *rest) for place, (name, *rest) in enumerate(runs)]


def metric_table(runs: Sequence[Run], config: Config) -> dict:
    """Each run's metrics, below it the paper's row of its kind; whatever a run knows of variety beside separation."""
    first, rows, names, real = runs[0], [], [*VARIETY], {}
    for run in (run for run in runs if run.metrics):
        groups = [run.metrics, *(value for name, value in run.metrics.items() if name not in ("intervals", "versions"))]
        values = {name: number(value) for group in groups for name, value in table(group).items()}
        real |= {name.removeprefix(REAL): values.pop(name) for name in list(values) if name.startswith(REAL)}
        names += [name for name, value in values.items() if name not in (*names, *SEPARATION, *COUNTS) and not math.isnan(value)]
        limits = {name: list(map(number, pair)) for name, pair in table(run.metrics.get("intervals")).items()
                  if isinstance(pair, list) and len(pair) == 2}
        if run is not first:
            values["ratio"] = values.get("fdr", math.nan) / (number(first.metrics.get("fdr")) or math.nan)
            limits["ratio"] = ratio_interval(*(places.scores(one.folder, config) for one in (first, run)))
        of_paper, base = row_of_paper(run), row_of_paper(first)
        rows.append({"run": run, "name": run.name, "values": values, "limits": limits,
                     "paper_fdr": SCORES[of_paper][-1] if of_paper else None})
        if of_paper:
            ratio = {"ratio": SCORES[of_paper][-1] / SCORES[base][-1]} if base and run is not first else {}
            rows.append({"run": None, "name": f"paper: {of_paper}", "limits": {},
                         "values": dict(zip(SCORE_COLUMNS, SCORES[of_paper], strict=True)) | ratio})
    rows += [{"run": None, "name": "real faces", "values": real, "limits": {}}] if real else []
    ours = sorted((row for row in rows if row["run"] and row["run"] is not first), key=lambda row: -row["values"].get("fdr", 0))
    best = (rows[0], ours[0]) if ours and first.unguided and rows[0]["run"] is first else None
    return {"rows": rows, "separation": list(SEPARATION), "variety": names, "best": best}


def row_of_paper(run: Run) -> str | None:
    """The row of the paper's table that a run corresponds to; None where there is none, or its records do not tell."""
    with suppress(UserError, LookupError, TypeError):
        return score_row(run.folder)
    return None


def verification_table(runs: Sequence[Run]) -> list[Mapping]:
    """Per cent on the benchmarks: ours, then the paper's rows; empty where nothing was verified."""
    ours = [{"name": f"{run.name}/{stage.file.parent.name}", "values": table(stage.record.get("per_cent"))}
            for run in runs for stage in run.stages if stage.script == "verify_fr"]
    return ours and ours + [
        {"name": f"paper: {name}", "paper": True, "values": dict(zip(VERIFICATION_COLUMNS, values, strict=True))}
        for name, values in VERIFICATION.items()]


if __name__ == "__main__":
    run_script(main)
