"""The paper's experiment in miniature: every strategy's identity overlap, and recognisers trained on each set.

Runs the stages' scripts with the preset `experiment`; run again after a stop, it goes on. Settings go to every stage:

    python -m experiments.experiment
    python -m experiments.experiment sampling.identities=100 sampling.images_per_identity=10

Writes  output/experiment/<run>/ for each run, output/experiment/scores/<recogniser>/table.md (score distributions) and
        output/experiment/recognisers.md (LFW accuracy of what was trained on each set, three seeds)
"""
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from config import places
from config.load import load_config
from utils.runtime.errors import UserError, run_script
from utils.runtime.files import file_digest, read_json, require_file, write_text

ROOT = Path(__file__).parent.parent
STRATEGIES = ("null", "close", "rand", "mid", "far")
RUNS = {"w0": ["guidance.w=0"]} | {name: [f"negatives.strategy={name}"] for name in STRATEGIES} | {
    "adaptdiff": ["negatives.strategy=far", "guidance.schedule=linear", "guidance.w=1"]}  # arXiv 2603.29569
SEEDS = (0, 1, 2)


def main() -> None:
    given = sys.argv[1:]
    sys.argv[1:] = ["--preset", "experiment", *given]
    config = load_config(__doc__)
    folder = places.experiment_folder(config)
    # what only the end needs, before hours are spent
    if not (config.verify.lfw_faces and config.verify.lfw_pairs):
        raise UserError("verify.lfw_pairs: no pairs are given; set it, and verify.lfw_faces")
    for aligned, pairs in zip(config.verify.lfw_faces, config.verify.lfw_pairs, strict=False):
        require_file(places.alignment_record(Path(aligned)), "verify.lfw_faces", "run make lfw first")
        require_file(pairs, "verify.lfw_pairs", "download pairs.txt of LFW's view 2")

    def stage(script: str, *settings: str) -> None:
        command = [sys.executable, ROOT / script, "--preset", "experiment", *given, *settings]
        if code := subprocess.run(command).returncode:
            raise UserError(f"{script}: stopped with exit code {code}; fix what its message names and run this again")

    # the sets: the same contexts and the same noise in each
    stage("create_sample_identity_contexts.py")
    for strategy in STRATEGIES:
        stage("create_negative_contexts.py", f"negatives.strategy={strategy}")
    for name, settings in RUNS.items():
        stage("sample.py", f"paths.run=experiment/{name}", *settings)
        stage("align.py", f"paths.run=experiment/{name}", *settings)
    stage("plot_distributions.py", "scores.overlay=" + ",".join(f"experiment/{name}" for name in RUNS))

    # recognisers, from scratch on each set
    accuracies = {name: [] for name in RUNS}
    for seed in SEEDS:
        for name in RUNS:
            fr = folder / name / "fr" / f"seed{seed}"
            stage("train_fr.py", f"paths.run=experiment/{name}", f"fr.name=seed{seed}", f"fr.seed={seed}")
            weights, record = fr / "backbone.safetensors", fr / "verification.json"
            if not record.is_file() or read_json(record)["digest"] != file_digest(weights):
                stage("verify_fr.py", f"verify.backbone={weights}")
            per_cent = read_json(record)["per_cent"]
            accuracies[name].append(per_cent.get("LFW", next(iter(per_cent.values()))))  # or that of the list given in its place
            write_text(folder / "recognisers.md", table(accuracies))
    print(table(accuracies))
    print(f"written to {folder / 'recognisers.md'} and {folder / 'scores'}")


def table(accuracies: dict[str, list[float]]) -> str:
    """LFW accuracy of the recognisers trained on each set, as Markdown."""
    lines = ["| trained on | LFW, % | seeds |", "|---|---|---|"]
    for name, values in accuracies.items():
        if values:
            spread = f" +- {stdev(values):.2f}" if len(values) > 1 else ""
            lines.append(f"| {name} | {mean(values):.2f}{spread} | {', '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
