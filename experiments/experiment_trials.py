"""One trial of experiments/experiment.py: a set of images made with some settings, a recogniser trained on it, and its tests.

A trial is made by the stages themselves, in folders named by what decides it, so that other weights, settings or another
kind of processor have folders of their own; what came out is kept as one file.
"""
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch

from config import places
from config.config import RECOMMENDED, Config
from config.load import load_config
from experiments import documents
from experiments.demo import STRATEGIES, stage
from experiments.solver_trials import Images, generator_gflop, gflop, processor
from models.backbones import BACKBONES
from models.published import backbone_digest
from utils.diffusion import spacings
from utils.diffusion.latent_diffusion import load_model
from utils.evaluation.verification import FOLDS, read_lfw_pairs
from utils.faces.aligned import read_kept
from utils.faces.folders import identity_folders, listing, select
from utils.runtime.errors import UserError
from utils.runtime.files import file_digest, read_json, require_file, text_digest, write_json, write_text
from utils.runtime.records import Record, State

W = (0.25, 0.5, 1.0)
W0, FAR = "w0", "far w0.5"
CONE = tuple(f"{name}={value}" for name, value in RECOMMENDED.items() if name.startswith("variety."))
WIDE = ("variety.cone_noise=contexts", "variety.cone_bound=fixed")
BAND = "align.band=0.2,0.6"  # of the included generator's faces at w = 0 six in seven
LOST, SPARE = 1.05, 1.3  # times as many identities are drawn: those that lose a face, or many to the band, are left out
KEPT = "docs/experiment_trials.json"  # what came out of the trials behind docs/experiment.md, whose folders are long gone
REAL = {"fr.minimum_images": 4, "fr.images_per_identity": 20}  # who of LFW is in the ceiling

# What two cores do in a second, at worst and at best: GFLOP of the generator in fp32 and of training; images.
RATES = {"draw": (150, 450), "align": (30, 100), "embed": (90, 400), "train": (80, 200)}


@dataclass(frozen=True)
class Arm:
    """What makes a set of images: settings of stages 1 to 3, and whether a band filter chooses among them."""

    name: str
    settings: tuple[str, ...] = ()
    band: bool = False

    @property
    def is_guided(self) -> bool:
        return "guidance.w=0" not in self.settings

    @property
    def is_plain(self) -> bool:
        """Of a negative, or none, and nothing else."""
        return not self.band and not any(one.startswith("variety.") for one in self.settings)


CEILING = Arm("real faces")
FRONTIER = {arm.name: arm for arm in (
    Arm(W0, ("guidance.w=0",)),
    *(Arm(f"{name} w{w:g}", (f"negatives.strategy={name}", f"guidance.w={w:g}")) for name, w in product(STRATEGIES, W)),
    Arm("adaptdiff", ("negatives.strategy=far", "guidance.schedule=linear", "guidance.w=1")))}  # arXiv 2603.29569
FRONTIER |= {arm.name: arm for base in (FAR, "far w1") for arm in (
    Arm(f"{base}, perturbed", FRONTIER[base].settings + CONE),
    *(Arm(f"{base}, perturbed to {lowest:g}", (*FRONTIER[base].settings, f"variety.cone={lowest:g}", *WIDE))
      for lowest in (0.7, 0.5)))}
FRONTIER["adaptdiff, perturbed"] = Arm("adaptdiff, perturbed", FRONTIER["adaptdiff"].settings + CONE)
ANNEALED = {base: Arm(f"{base}, annealed", (*FRONTIER[base].settings, "variety.annealing=0.1")) for base in (W0, FAR)}
FRONTIER[ANNEALED[FAR].name] = ANNEALED[FAR]

IDENTITIES = [FRONTIER[name] for name in (W0, FAR, f"{FAR}, perturbed")]


def factorial(best: Iterable[str] = ()) -> list[Arm]:
    """{w = 0, Far} x {plain, perturbed} x {no filter, band}; w per image and annealing; `best`, others of the frontier."""
    arms = [Arm(", ".join([base, *["perturbed"] * cone, *["band"] * band]), FRONTIER[base].settings + CONE * cone, band)
            for base, cone, band in product((W0, FAR), (False, True), (False, True))]
    arms.append(Arm("far w0..1", ("negatives.strategy=far", "guidance.w=1", "variety.w=uniform")))
    arms += ANNEALED.values()
    return arms + [FRONTIER[name] for name in best if name not in {arm.name for arm in arms}]


@dataclass(frozen=True)
class Trial:
    part: str  # frontier, ceiling, factorial or identities
    arm: Arm
    seed: int  # of contexts, noise and training
    images: Images  # that are trained on

    @property
    def group(self) -> str:
        return f"identities {self.images}" if self.part == "identities" else self.part

    @property
    def table(self) -> str:
        """Trials that are compared with one another have the same: the ceiling is with the factorial."""
        return "factorial" if self.part == "ceiling" else self.group


class TooFewError(UserError):
    """Fewer images are left than are to be trained on: a band filter left them out, or faces were not found."""


class Laboratory:
    """Makes trials with the settings of a config.

    Args:
        given: the settings' texts, for every stage.
        spare: how many times as many images of each identity are drawn in the factorial, for its band filter to choose from.
    """

    def __init__(self, config: Config, given: Sequence[str], spare: float, device: torch.device) -> None:
        self.given, self.spare, self.kind, self.contexts_number = given, spare, processor(device), config.contexts.number
        self.processor = f"{self.kind}, {config.training.precision}"
        self.folder, self.verify = places.experiment_folder(config), config.verify
        self.scorer = {"scores.recogniser": backbone_digest(require_file(
            config.scores.recogniser, "scores.recogniser", "give the weights of a recogniser"))}
        self.model, weights = load_model(config.model, config.sampling, device)
        self.weights = [file_digest(file) for file in (*weights, config.contexts.statistics)]
        self.gflop = generator_gflop(self.model, device)
        self.train_gflop = 3 * gflop(lambda: BACKBONES[config.fr.backbone](0.0)(torch.zeros(2, 3, 112, 112))) / 2  # and backward
        self._write_tests()

    def _write_tests(self) -> None:
        """The pairs and people of LFW's folds 9 and 10, the last two tenths of the first list; other lists are used whole."""
        lists, folders = self.verify.lfw_pairs, self.verify.lfw_faces
        if not lists or len(folders) != len(lists):
            raise UserError(f"verify.lfw_faces: {len(folders)} folders for {len(lists)} pair lists; give LFW's pairs first, then "
                            "those of other test sets, and a folder of aligned faces for each")
        for folder in folders:
            if folders.count(folder) > 1:
                raise UserError(f"verify.lfw_faces: names {folder} twice; give each pair list a test set of its own")
            require_file(places.alignment_record(Path(folder)), "verify.lfw_faces", "align it first: make lfw, or align.py")
        pairs, same = read_lfw_pairs(lists[0])
        held_out = list(zip(pairs, same, strict=True))[-(len(pairs) // 5):]
        kinds = [[pair for pair, is_same in held_out if is_same == kind] for kind in (True, False)]
        each = len(kinds[0]) // FOLDS
        lines = [f"{FOLDS}\t{each}"]
        for fold in range(FOLDS):  # each as LFW's are, matched pairs and mismatched ones
            for pair in (pair for kind in kinds for pair in kind[fold * each : (fold + 1) * each]):
                (a, i), (b, j) = (name.partition("/")[2].rsplit("_", 1) for name in pair)
                lines.append("\t".join([a, i, j] if a == b else [a, i, b, j]))
        people = sorted({name.partition("/")[0] for pair, _ in held_out for name in pair})
        self.pairs, self.people, self.people_with_faces = (
            self.folder / f"lfw_folds_9_and_10_{name}.txt" for name in ("pairs", "people", "people_with_faces"))
        write_text(self.pairs, "\n".join(lines) + "\n")
        write_text(self.people, "\n".join(people) + "\n")
        faces = [identity_folders(folder) for folder in folders]
        self.lfw = faces[0]
        write_text(self.people_with_faces, "\n".join(name for name in people if name in self.lfw) + "\n")
        faces[0] = {name: files for name, files in faces[0].items() if name in people}
        self.test_images = sum(len(files) for folder in faces for files in folder.values())
        self.tests = [listing(folder) for folder in faces] + [file_digest(file) for file in (self.pairs, *lists[1:])]
        self.tests.append(self.verify.images_per_identity)

    # ---- what decides a trial ----------------------------------------------------------------------------------------

    def drawn(self, trial: Trial) -> Images:
        """The images that a trial chooses from; those of one seed of the factorial all have the same noise, and lose alike."""
        more, each = (SPARE, self.spare) if trial.part == "factorial" else (LOST, 1)
        return Images(math.ceil(more * trial.images.identities), math.ceil(each * trial.images.each))

    def arguments(self, trial: Trial) -> list[str]:
        """Of every stage."""
        drawn, seed = self.drawn(trial), trial.seed
        chosen = ["--preset", "experiment", *self.given, *trial.arm.settings, f"contexts.seed={seed}", f"sampling.seed={seed}",
                  f"fr.seed={seed}", f"contexts.number={max(self.contexts_number, drawn.identities)}",
                  f"sampling.identities={drawn.identities}", f"sampling.images_per_identity={drawn.each}",
                  "fr.keep_list=", "fr.leave_out=", "scores.identities=0", "scores.images_per_identity=0"]
        if trial.arm is CEILING:
            source, number = self.real, ""
            chosen += [f"fr.identities={self.real_people(len(trial.images))}", *(f"{name}={n}" for name, n in REAL.items())]
        else:
            config = load_config("", arguments=chosen)
            chosen.append(f"contexts.name=experiment-seed{seed}-{short(asdict(config.contexts), self.weights[-1])}")
            # how many are drawn decides no image, but which ones a trial chooses from
            sampling, number = replace(config.sampling, identities=1, images_per_identity=1), f"-{drawn}"
            source = short(*map(asdict, (config.contexts, config.negatives, config.guidance, config.variety, sampling)),
                           config.align.template, config.align.minimum_face, self.weights, self.kind)
        config = load_config("", arguments=chosen)
        recipe = short(asdict(config.fr), config.training.precision, config.training.compile, str(trial.images), self.kind,
                       source, [BAND, self.selector] if trial.arm.band else "")
        if trial.arm is CEILING:
            chosen += [f"fr.images={self.verify.lfw_faces[0]}", f"fr.leave_out={self.people_with_faces}"]
        run = f"{slug(trial.arm.name.removesuffix(', band'))}-seed{seed}-{source[:8]}{number}"
        others = ",".join(self.verify.lfw_pairs[1:])
        return [*chosen, f"paths.run=experiment/runs/{run}", f"fr.name={recipe}",
                f"align.keep_identities={trial.images.identities}", f"align.keep_images={trial.images.each}",
                BAND if trial.arm.band else "align.band=", "scores.overlay=", "verify.backbone=", "verify.bins=", "verify.ijbc=",
                f"verify.lfw_pairs={self.pairs},{others}", f"verify.all_pairs={','.join(self.verify.lfw_faces)}",
                f"verify.people={self.people}"]

    def record(self, trial: Trial) -> Record:
        config = load_config("", arguments=self.arguments(trial))
        # a folder of its own: processes that make something in one folder do it in turn
        folder = self.folder / "trials" / f"{slug(trial.group)}-{slug(trial.arm.name)}-seed{trial.seed}"
        return Record(folder / "trial.json", {"run": places.run_folder(config).name, "recogniser": config.fr.name,
                                              "tests": self.tests, **self.scorer}, target=folder / "figures.json")

    @cached_property
    def real(self) -> str:
        return listing(self.lfw)

    @cached_property
    def selector(self) -> str:
        config = load_config("", arguments=["--preset", "experiment", *self.given])
        return backbone_digest(require_file(config.contexts.recogniser, "contexts.recogniser", "the band filter needs the "
                                            "recogniser that the contexts are of; give it, or leave the factorial out (--parts)"))

    def real_people(self, images: int) -> int:
        """How many people of LFW, none of them in the tests, together have a number of images as near to `images` as can be."""
        names = self.people.read_text(encoding="utf-8").splitlines()
        chosen = select(self.lfw, 0, REAL["fr.images_per_identity"], REAL["fr.minimum_images"], names)
        totals = list(accumulate(map(len, chosen.values())))
        if not totals:
            raise UserError(f"{self.verify.lfw_faces[0]}: nobody but the people of folds 9 and 10 has "
                            f"{REAL['fr.minimum_images']} images; give all of LFW, aligned")
        return 1 + min(range(len(totals)), key=lambda n: abs(totals[n] - images))

    # ---- what is kept of it ------------------------------------------------------------------------------------------

    def row(self, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
        """A trial and its figures, as KEPT has them."""
        return {"table": trial.table, "images": str(trial.images), "arm": trial.arm.name, "seed": trial.seed,
                "processor": self.processor, "recipe": self.recipe(trial.arm, trial.table), **figures}

    def recipe(self, arm: Arm, table: str) -> str:
        """What decides an arm's figures: settings, weights, pair lists. But for seed, number of images, processor and the real
        faces, whose aligned pixels may differ from one processor to another."""
        config = load_config("", arguments=["--preset", "experiment", *self.given, *arm.settings])
        groups = (replace(config.contexts, seed=0, number=2, recogniser="", name=""), config.negatives, config.guidance,
                  config.variety, replace(config.sampling, seed=0, identities=1, images_per_identity=1),
                  replace(config.fr, seed=0, name="", images="", leave_out="", keep_list="", identities=0))
        chosen = (BAND * arm.band, self.spare * (table == "factorial"), config.align.template, config.align.minimum_face,
                  config.training.compile)
        return short(*map(asdict, groups), *chosen, self.scorer, self.lists, self.verify.images_per_identity, self.weights)

    @cached_property
    def lists(self) -> list[str]:
        return [f"{file.stem} {file_digest(file)}" for file in map(Path, self.verify.lfw_pairs)]

    def kept(self, images: Mapping[str, Images]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows of KEPT that trials of today would have, and the other rows; `images`: the sizes of the sets of a table.

        Raises:
            UserError: the file holds something else.
        """
        file, fix = documents.ROOT / KEPT, "restore it from the repository"
        rows = read_json(file, fix) if file.is_file() else []
        needed = {"table": str, "images": str, "arm": str, "seed": int, "processor": str, "recipe": str, "tests": dict}
        if not isinstance(rows, list) or not all(isinstance(row, dict) and all(
                isinstance(row.get(key), kind) for key, kind in needed.items()) for row in rows):
            raise UserError(f"{file}: is no list of trials; {fix}")
        arms = {arm.name: arm for arm in (CEILING, *factorial(FRONTIER))}
        sizes = {table: str(one) for table, one in images.items()}
        found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
        for row in rows:
            is_todays = (row["images"] == sizes.get(row["table"], row["images"]) and row["arm"] in arms
                         and row["recipe"] == self.recipe(arms[row["arm"]], row["table"]))
            found[not is_todays].append(row)
        return found

    # ---- what it costs -----------------------------------------------------------------------------------------------

    def work(self, trial: Trial, is_drawn: bool = False) -> dict[str, float]:
        """How much of each of RATES a trial takes; `is_drawn`: its images are there."""
        config = load_config("", arguments=self.arguments(trial))
        found = {"train": (len(trial.images) * config.fr.epochs + 2 / 3 * self.test_images) * self.train_gflop}
        if trial.arm is not CEILING:
            drawn, sampling = self.drawn(trial), config.sampling
            steps = len(spacings.timesteps(sampling.spacing, sampling.solver, sampling.steps, self.model.betas))
            there = len(list(places.samples(places.run_folder(config)).glob("*/*.png")))
            left = 0 if is_drawn else max(len(drawn) - there, 0)
            found["draw"] = left * (steps * self.gflop["both" if trial.arm.is_guided else "one"] + self.gflop["decode"])
            found["align"] = left
            found["embed"] = len(trial.images) + len(drawn) * trial.arm.band
        return found

    # ---- a trial -----------------------------------------------------------------------------------------------------

    def is_made(self, trial: Trial) -> bool:
        return self.record(trial).state() is State.DONE

    def figures(self, trial: Trial) -> dict[str, Any]:
        """What came out of a trial; it is made where it is not there. Raises TooFewError."""
        record = self.record(trial)
        with record.making() as is_new:
            if is_new:
                write_json(record.target, self._make(trial))
        return read_json(record.target)

    def _make(self, trial: Trial) -> dict[str, Any]:
        arguments, figures = self.arguments(trial), {}
        config = load_config("", arguments=arguments)
        run = places.run_folder(config)
        if trial.arm is not CEILING:
            for script in ("create_sample_identity_contexts", *["create_negative_contexts"] * trial.arm.is_guided, "sample",
                           "align"):
                stage(script, *arguments)
            require_all(trial, places.aligned(run))
            stage("plot_distributions", *arguments)
            metrics = read_json(places.scores(run, config) / "metrics.json")
            figures = {name: metrics[name] for name in ("genuine_mean", "impostor_mean", "vendi", "fdr")}
        for script in ("train_fr", "verify_fr"):
            stage(script, *arguments)
        folder = places.fr_folder(config)
        verification = read_json(folder / "verification.json")
        for packed in folder.parent.glob("faces-*"):  # 0.1 GB, made again in seconds
            packed.unlink()
        return figures | {"tests": {name: {"accuracy": value, **of_all["per_cent"]} for (name, value), of_all in zip(
            verification["per_cent"].items(), verification["all_pairs"].values(), strict=True)}}


def require_all(trial: Trial, aligned: Path) -> None:
    """Raises TooFewError where fewer faces are kept than are to be trained on."""
    try:
        kept = sum(map(len, read_kept(aligned).values()))
    except UserError:  # none
        kept = 0
    if kept < len(trial.images):
        raise TooFewError(f"{trial.arm.name}, seed {trial.seed}: {kept} of {len(trial.images)} images are left"
                          + (f" by {BAND}" if trial.arm.band else ", other faces were not found")
                          + ("; raise --spare" if trial.part == "factorial" else ""))


def slug(name: str) -> str:
    """A name as a part of a file's."""
    return name.replace(",", "").replace(" ", "-")


def short(*values: Any) -> str:
    return text_digest(json.dumps(values, sort_keys=True))[:8]
