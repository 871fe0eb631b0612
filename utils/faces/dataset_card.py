"""A dataset card beside a sampled set, so that its folder can be published as it is: README.md with the hub's YAML head."""
import json
import math
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from config import places
from config.load import from_record
from utils.faces.aligned import alignment_setting
from utils.faces.folders import identity_folders
from utils.faces.images import read_image
from utils.runtime.errors import UserError
from utils.runtime.files import read_json, write_text
from utils.runtime.records import decided, noted

TEMPLATE = Path(__file__).with_suffix(".md")
GROUPS = ("contexts", "negatives", "guidance", "variety", "model", "sampling")  # of settings that decide the images
SIZES = (1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")
WEIGHTS = "configuration", "diffusion model", "first stage, encoder", "first stage, decoder"
SAMPLE, ALIGN = "run sample.py again", "run align.py again"
OF_NOBODY = "uniform", "gaussian"  # sources of contexts that are drawn
WHO = {  # by whether the contexts are drawn
    True: "The faces are of people who do not exist.",
    False: "The contexts were not drawn at random: where they are embeddings of real people, the faces resemble these people.",
}
HOW = {  # by whether w > 0
    True: "by NegFaceDiff's sampling (arXiv 2508.09661)",
    False: "without negative contexts (w = 0, the baseline of NegFaceDiff, arXiv 2508.09661)",
}
CONTEXTS = {
    "uniform": "Drawn uniformly on the unit sphere: of nobody.",
    "gaussian": "Drawn from the distribution of real embeddings (mean and covariance, by `{statistics}`): of nobody.",
    "published": "Read from `{file}`.",
    "extracted": "Embeddings of the faces in `{faces}` by `{recogniser}`: **of real people**.",
}
LICENCES = {  # by the beginning of model.diffusion
    "models/demo": "The miniature generator of the repository (models/demo/CARD.md), trained on Labeled Faces in the Wild "
                   "and CelebA (photographs of public figures from the web, published for research). For research and for trying "
                   "the software.",
    "data/published/": "The weights that the authors of IDiff-Face and NegFaceDiff give to those who ask, under the terms that "
                       "they were given with.",
}
OTHER_LICENCE = "`{diffusion}`. Before this set is published, say here what it was trained on, and under which terms."
METRICS = {"eer": "EER", "fmr100": "FMR100", "fmr1000": "FMR1000", "genuine_mean": "genuine mean",
           "impostor_mean": "impostor mean", "fdr": "FDR"}


def write_cards(run: Path) -> None:
    """Write <run>/samples/README.md and, where they are aligned, <run>/aligned/README.md, by the run's records.

    Folders of other images, as of photographs, get none; neither does a run of an earlier version, which is said.
    """
    if not places.run_record(run).is_file():
        return
    for folder in (folder for folder in (places.samples(run), places.aligned(run)) if any(folder.glob("*/*.png"))):
        try:
            if folder == places.samples(run) or alignment_setting(folder, "images", ALIGN) == "":  # the run's own, aligned
                write_text(folder / "README.md", card(run, folder))
        except UserError as error:
            print(f"{folder}: gets no dataset card ({error})")


def card(run: Path, folder: Path) -> str:
    """The card of a folder of identity folders of a run. Raises UserError where the record does not say how it was made."""
    file = places.run_record(run)
    decides, record = decided(file, ("contexts", "weights"), SAMPLE), read_json(file)
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("versions"), dict):
        raise UserError(f"{file}: does not say what its config was; {SAMPLE}")
    config = asdict(from_record(record["config"]))
    settings = {f"{group}.{name}": shown(value) for group in GROUPS for name, value in config[group].items()}
    faces = identity_folders(folder)
    images, first, source = sum(map(len, faces.values())), read_image(next(iter(faces.values()))[0]), config["contexts"]["source"]
    diffusion, is_aligned = config["model"]["diffusion"], folder == places.aligned(run)
    licence = next((text for start, text in LICENCES.items() if diffusion.startswith(start)), OTHER_LICENCE)
    name = " ".join(run.name.split()) + ": synthetic faces" + (", aligned" if is_aligned else "")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name, quoted_name=json.dumps(name), images=f"{images:,}", identities=f"{len(faces):,}",
        size=next((size for limit, size in SIZES if images < limit), "n>10M"), pixels=f"{first.shape[1]} x {first.shape[0]}",
        who=WHO[source in OF_NOBODY], how=HOW[config["guidance"]["w"] > 0],
        aligned=", and aligned by `align.py`; `kept.csv` lists the selection" if is_aligned else "",
        contexts=CONTEXTS[source].format_map({key: shown(value) for key, value in config["contexts"].items()})
        + f" SHA-256 of ids and contexts: `{decides['contexts']}`.",
        licence=licence.format(diffusion=shown(diffusion)), figures=figures(run),
        weights="\n".join(f"| {file} | `{digest}` |" for file, digest in zip(WEIGHTS, decides["weights"], strict=False)),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value != ""),
        versions=", ".join(f"{package} {version}" for package, version in record["versions"].items()))


def shown(value: Any) -> Any:
    """A setting's value; of a path on this machine the last part, since a card is published."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def figures(run: Path) -> str:
    """A row for each recogniser that scored the faces that are kept now."""
    rows, kept = [], noted(places.alignment_record(places.aligned(run)), "kept")
    for file in sorted((run / "scores").glob("*/metrics.json")):
        if noted(file.with_name("scores.json"), "kept") != kept:  # of an earlier selection
            continue
        metrics = read_json(file)
        if not isinstance(metrics, dict) or not all(isinstance(metrics.get(name, 0.0), int | float) for name in METRICS):
            raise UserError(f"{file}: is damaged; run plot_distributions.py again")
        values = [f"{metrics.get(name, math.nan):.4f}" for name in METRICS]
        rows.append(f"| {' | '.join([file.parent.name, str(metrics.get('images', '')), *values])} |")
    if not rows:
        return "Not measured yet (`align.py`, `plot_distributions.py`)."
    head = ["recogniser", "images", *METRICS.values()]
    return "\n".join(["Genuine and impostor scores of the aligned faces (`plot_distributions.py`).", "",
                      f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])
