"""Where every artifact lies. No other module builds a path inside the output root, so the stages cannot disagree.

What is named after settings takes the config; what lies inside a run takes the run's folder, of which the scripts that
compare runs have several.
"""
import os
from collections.abc import Sequence
from pathlib import Path

from config.config import Config

# ---- identities ------------------------------------------------------------------------------------------------------

def contexts_name(config: Config) -> str:
    """The name that the contexts' settings make: files of other contexts never meet."""
    contexts = config.contexts
    if contexts.name:
        return contexts.name
    apart = f"-apart{contexts.highest_cosine:g}" if contexts.highest_cosine < 1 else ""
    if contexts.source == "uniform":
        return f"uniform-{contexts.number}x{contexts.dimension}-seed{contexts.seed}{apart}"
    if contexts.source == "gaussian":
        return f"gaussian-{contexts.number}-seed{contexts.seed}{apart}"
    if contexts.source == "published":
        return f"published-{Path(contexts.file).stem}"
    return f"extracted-{Path(contexts.faces).name}-{Path(contexts.recogniser).stem}-per-{contexts.per}"


def contexts_file(config: Config) -> Path:
    return Path(config.paths.output) / "contexts" / f"{contexts_name(config)}.npz"


def negatives_name(config: Config) -> str:
    """The strategy and what decides its choice: `far`, `rand-pool500-seed3`."""
    negatives = config.negatives
    if negatives.strategy == "custom":
        return f"custom-{Path(negatives.custom_file).stem}"
    return (negatives.strategy + (f"-pool{negatives.pool}" if negatives.pool else "")
            + (f"-seed{negatives.seed}" if negatives.seed else ""))


def negatives_file(config: Config) -> Path:
    file = contexts_file(config)
    return file.with_name(f"{file.stem}.negatives-{negatives_name(config)}.npz")


def around(folders: Sequence[Path]) -> Path:
    """The folder that all these lie in; an absolute one where one of them is absolute."""
    parents = [folder.parent for folder in folders]
    return Path(os.path.commonpath([os.path.abspath(one) for one in parents] if any(map(Path.is_absolute, parents)) else parents))


# ---- a run -----------------------------------------------------------------------------------------------------------

def run_folder(config: Config) -> Path:
    """The folder of a run; its name says what makes its images differ (w = 0 has no strategy)."""
    if config.paths.run:
        return Path(config.paths.output) / config.paths.run
    guidance, sampling = config.guidance, config.sampling
    schedule = guidance.schedule
    if schedule == "interval":
        schedule += "{}to{}".format(*guidance.interval)
    rule = "" if guidance.rule == "negative" else f"{guidance.rule}-"
    per_image = "" if config.variety.w == "constant" else f"-{config.variety.w}"
    guided = f"{negatives_name(config)}_{rule}w{guidance.w:g}{per_image}-{schedule}" if guidance.w else "w0"
    spacing = "" if sampling.spacing == "default" else f"-{sampling.spacing}"
    solver = f"{sampling.solver}{sampling.steps}{spacing}" + ("-published" if sampling.as_published else "")
    guided += variety_name(config)
    name = f"{Path(config.model.diffusion).name}_{contexts_name(config)}_{guided}_{solver}_seed{sampling.seed}"
    return Path(config.paths.output) / config.preset / name


def variety_name(config: Config) -> str:
    """What of the settings `variety` is on: `_cone0.7-contexts-safe_cads0.1`; empty where nothing is."""
    variety, name = config.variety, ""
    if variety.cone < 1:
        name += f"_cone{variety.cone:g}" + ("-contexts" if variety.cone_noise == "contexts" else "") + (
            "-safe" if variety.cone_bound == "safe" else "")
    if variety.annealing:
        name += f"_cads{variety.annealing:g}"
    return name


def run_folders(config: Config) -> list[Path]:
    """The runs of scores.overlay, or else the one run."""
    return [Path(config.paths.output) / name for name in config.scores.overlay] or [run_folder(config)]


def run_record(run: Path) -> Path:
    return run / "run.json"


def samples(run: Path) -> Path:
    return run / "samples"


def contact_sheet(run: Path) -> Path:
    return run / "contact_sheet.png"


def aligned(run: Path) -> Path:
    return run / "aligned"


def alignment_record(aligned_faces: Path) -> Path:
    return aligned_faces / "align.json"


def cosines(aligned_faces: Path) -> Path:
    """Those of aligned faces to their contexts, for the band filter."""
    return aligned_faces / "cosines.npz"


def outside_band(aligned_faces: Path) -> Path:
    return aligned_faces / "outside_band.csv"


def scores(run: Path, config: Config) -> Path:
    return run / "scores" / Path(config.scores.recogniser).stem


def all_embeddings(run: Path, config: Config) -> Path:
    """Those of all kept faces of a run, of which stage 5 may score some."""
    return scores(run, config).with_name(f"{scores(run, config).name}.all.npz")


def real_embeddings(config: Config) -> Path:
    """The embeddings of the real faces that runs are compared with, a cache; both folders' names, since aligned/ recurs."""
    real = Path(config.scores.real).resolve()
    return Path(config.paths.output) / "faces" / f"{real.parent.name}-{real.name}-{Path(config.scores.recogniser).stem}.npz"


def fr_folder(config: Config) -> Path:
    return run_folder(config) / "fr" / (config.fr.name or f"{config.fr.head}-{config.fr.backbone}")


def fr_folders(run: Path) -> list[Path]:
    """The recognisers that were trained on a run, by name."""
    return sorted(folder for folder in (run / "fr").glob("*") if folder.is_dir())


def packed_faces(config: Config, digest: str) -> Path:
    """The faces that a recogniser is trained on, named by what is in them; runs on the same faces share the file."""
    return fr_folder(config).parent / f"faces-{digest[:16]}.npy"


def verification_file(backbone: Path, digest: str, config: Config) -> Path:
    """Beside the backbone of a training run; another's is in <output>/verification/, by what is in it, since names recur."""
    output = Path(config.paths.output)
    if backbone.name == "backbone.safetensors" and backbone.resolve().is_relative_to(output.resolve()):
        return backbone.with_name("verification.json")
    return output / "verification" / f"{backbone.stem}-{digest[:8]}" / "verification.json"


def report(folder: Path) -> Path:
    return folder / "report.html"


# ---- stage 0 and the experiments -------------------------------------------------------------------------------------

def training_folder(config: Config) -> Path:
    """Where the weights of stage 0 come to lie, as published weights do, with the state of their training."""
    return Path(config.paths.output) / "training" / (config.training.name or config.preset)


def face_cache(config: Config, folders: Sequence[str] = ()) -> Path:
    """Where what is computed once of folders of faces, by default the training faces, is kept."""
    names = [Path(os.path.abspath(folder)).name for folder in folders or config.training.faces]
    return Path(config.paths.output) / "faces" / "+".join(names)


def experiment_folder(config: Config, name: str = "experiment") -> Path:
    return Path(config.paths.output) / name


def solvers_folder(config: Config) -> Path:
    return Path(config.paths.output) / "solvers"


def reconstruction_sheet(config: Config) -> Path:
    return Path(config.paths.output) / "reconstruction" / f"{Path(config.model.first_stage_encoder).parent.name}.png"
