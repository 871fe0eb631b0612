"""What a run's folder holds and how it was made: images, commands, settings, digests, versions, times, training logs."""
import csv
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from config import places
from config.config import PRESETS, Config
from config.load import from_record, resolve
from utils.faces.folders import identity_folders
from utils.runtime.errors import UserError
from utils.runtime.files import read_json
from utils.runtime.foreign_arrays import reading

# of each stage, the groups of settings that it reads
GROUPS = {"create_sample_identity_contexts": ("contexts",), "create_negative_contexts": ("contexts", "negatives"),
          "sample": ("contexts", "negatives", "model", "guidance", "variety", "sampling"), "align": ("align",),
          "plot_distributions": ("scores",), "train_fr": ("fr", "training"), "verify_fr": ("fr", "verify")}


def table(value: Any) -> Mapping[str, Any]:
    """A JSON object, or an empty one in place of whatever else a file holds."""
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A finite number, or NaN in place of whatever else a file holds."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def written(value: Any) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(written, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Stage:
    """A stage that was run: its script, its record, the record's file and the file that it writes last."""

    script: str
    record: Mapping[str, Any]
    file: Path
    last: Path

    def settings(self) -> Iterator[tuple[str, Any]]:
        """The settings that it read, by their dotted names."""
        config = table(self.record.get("config"))
        for group in GROUPS[self.script]:
            yield from ((f"{group}.{name}", value) for name, value in table(config.get(group)).items())

    def command(self) -> str:
        """The command line that gives it these settings: its preset, and whatever differs from that."""
        config = table(self.record.get("config"))
        preset = config["preset"] if config.get("preset") in list(PRESETS) else "demo"
        defaults, paths = asdict(resolve(PRESETS[preset], {})), table(config.get("paths"))
        given = [*self.settings(), ("paths.output", paths.get("output"))]
        given += [("paths.run", paths.get("run"))] if "contexts" not in self.script else []
        words = ["python", f"{self.script}.py", *(["--preset", preset] if preset != "demo" else [])]
        for name, value in given:
            group, _, last = name.partition(".")
            if last in defaults[group] and written(value) not in (written(defaults[group][last]), "None"):
                words.append(f"{name}={written(value)}")
        return shlex.join(words)

    def digests(self) -> Iterator[tuple[str, str]]:
        """SHA-256 of what it was made from, by name."""
        for name, value in table(self.record.get("decides")).items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str) and len(one) == 64:
                    yield f"{self.script}: {name}", one

    def times(self) -> tuple[str, str, str]:
        """When it began, when it wrote its last file (UTC, as the files say), and the time between."""
        begun, ended = (datetime.fromtimestamp(file.stat().st_mtime, UTC) if file.is_file() else None
                        for file in (self.file, self.last))
        took = "" if not (begun and ended) else str(max(ended - begun, begun - begun)).split(".")[0]
        return tuple(f"{at:%Y-%m-%d %H:%M}" if at else "" for at in (begun, ended)) + (took,)


@dataclass(frozen=True)
class Run:
    """A run's folder: the name that tells it from the others, and the number that gives it its colour."""

    name: str
    number: int
    folder: Path
    stages: Sequence[Stage]
    metrics: Mapping[str, Any]

    @cached_property
    def settings(self) -> dict[str, str]:
        """What it was sampled with; empty where it was not sampled here."""
        return {name: written(value) for stage in self.stages if stage.script == "sample" for name, value in stage.settings()}

    @property
    def unguided(self) -> bool:
        return self.settings.get("guidance.w") == "0"

    @property
    def guidance(self) -> str:
        """w, the rule and the schedule, where they are not the paper's."""
        words = [self.settings.get(f"guidance.{name}", "") for name in ("rule", "schedule")]
        return " ".join([f"w = {self.settings.get('guidance.w')}", *sorted({*words} - {"negative", "constant", ""})])

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        """The images as they were before alignment, or else the aligned ones, by identity. Raises UserError without any."""
        aligned = places.aligned(self.folder)
        record = places.alignment_record(aligned)
        given = table(table(read_json(record)).get("decides")).get("align.images") if record.is_file() else ""
        roots = (Path(given) if isinstance(given, str) and given else aligned, places.samples(self.folder))
        return identity_folders(next((root for root in roots[::1 if given else -1] if root.is_dir()), aligned))

    def image(self, identity: str, name: str) -> Path | None:
        """One of its images, by its name in failures.csv."""
        return next((file for file in self.images.get(identity, ()) if file.name == name), None)


def stages(run: Path, config: Config) -> list[Stage]:
    """The stages that a run has the records of, in their order. Raises UserError where one is no JSON."""
    aligned, scores, sampled = places.aligned(run), places.scores(run, config), places.run_record(run)
    files = [("sample", sampled, places.contact_sheet(run)),
             ("align", places.alignment_record(aligned), aligned / "kept.csv"),
             ("plot_distributions", scores / "scores.json", scores / "metrics.json")]
    settings = table(read_json(sampled)).get("config") if sampled.is_file() else None
    with suppress(UserError, AttributeError, TypeError):  # settings of another version do not say where its contexts are
        made = from_record(settings)
        made = replace(made, paths=replace(made.paths, output=config.paths.output))
        before = [("create_sample_identity_contexts", places.contexts_file(made))]
        before += [("create_negative_contexts", places.negatives_file(made))] if made.guidance.w else []
        files = [(script, file.with_suffix(".json"), file) for script, file in before] + files
    for fr in places.fr_folders(run):
        verified = fr / "verification.json"
        files += [("train_fr", fr / "run.json", fr / "backbone.safetensors"), ("verify_fr", verified, verified)]
    return [Stage(script, table(read_json(file)), file, last) for script, file, last in files if file.is_file()]


def grouped(values: Sequence[tuple[str, str, Any]]) -> list[tuple[str, list]]:
    """(run, name, value) -> for each name its values, each with the runs that have it; first those that differ."""
    names: dict[str, dict[str, dict[str, None]]] = {}
    for run, name, value in values:
        names.setdefault(name, {}).setdefault(written(value), {})[run] = None
    return sorted(((name, list(by_value.items())) for name, by_value in names.items()), key=lambda row: len(row[1]) == 1)


def training_log(file: Path) -> list[dict[str, float]]:
    """The rows of a training log, without what is no number in them; none where there is no log. Raises UserError."""
    rows: list[dict[str, float]] = []
    if file.is_file():
        with reading(file, "a readable log", "delete it"), open(file, encoding="utf-8", errors="replace", newline="") as opened:
            for texts in csv.DictReader(opened):
                rows.append({})
                for name, text in texts.items():
                    with suppress(TypeError, ValueError):
                        rows[-1] |= {name: float(text)} if name and math.isfinite(float(text)) else {}
    return rows
