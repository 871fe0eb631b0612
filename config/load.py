"""From config/config.py and the command line to one checked, frozen Config."""
import dataclasses
import difflib
import math
import os
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import PurePath
from typing import Any

from config.config import DEFAULT_PRESET, PRESETS, Config
from config.gone import GONE
from utils.runtime.errors import UserError

Choices = Mapping[str, Iterable[str]]
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_config(doc: str, reads: Collection[str] = (), choices: Choices | None = None,
                arguments: Sequence[str] | None = None) -> Config:
    """The settings of this run: config.py, then the preset, then the overrides, checked before anything is loaded.

    Args:
        doc: the script's docstring, the first part of `--help`.
        reads: the groups of settings that the script reads, which `--help` lists; by default all. Others may be given
            too, so that one set of overrides goes through all stages.
        choices: what a setting that names a method may be, by its dotted name: the keys of that method's registry.
        arguments: `[--preset NAME] [group.name=value ...]`; by default those of the command line.
    Raises:
        UserError: an unknown name, a wrong type, a value out of range, or an impossible combination.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    choices = {name: tuple(values) for name, values in (choices or {}).items()}
    if "-h" in arguments or "--help" in arguments:
        print(help_text(doc, reads, choices))
        sys.exit(0)
    preset, overrides = DEFAULT_PRESET, {}
    while arguments:
        argument = arguments.pop(0)
        if argument == "--preset" and arguments:
            preset = arguments.pop(0)
        elif argument.startswith("--preset="):
            preset = argument.removeprefix("--preset=")
        elif "=" in argument and not argument.startswith("-"):
            name, text = argument.split("=", 1)
            overrides[name] = text
        else:
            raise UserError(f"{argument}: is not understood; write --preset NAME or group.name=value, or see --help")
    if preset not in PRESETS:
        raise UserError(f"--preset: '{preset}' is unknown; {_nearest(preset, PRESETS)}")
    return resolve({"preset": preset} | PRESETS[preset], overrides, choices)


def resolve(preset: Mapping[str, Any], overrides: Mapping[str, str], choices: Choices | None = None) -> Config:
    """Config's defaults, overlaid by a preset's values and then by the overrides' texts. Raises UserError."""
    known, choices = dict(settings(Config)), choices or {}
    values = dict(preset)
    for name in (*preset, *overrides):
        if name in GONE:
            raise UserError(f"{name}: {GONE[name]}")
        if name not in known and name != "preset":
            raise UserError(f"{name}: is an unknown setting; {_nearest(name, known)}")
    values |= {name: _parse(name, text, known[name]) for name, text in overrides.items()}
    values = {name: _expanded(name, value) for name, value in values.items()}
    config = _build(Config, values)
    for name, field in known.items():
        _check_value(name, attrgetter(name)(config), field, choices.get(name) or field.metadata["choices"])
    check_combinations(config)
    return config


def from_record(values: Mapping[str, Any]) -> Config:
    """The Config of a record, as dataclasses.asdict gave it. Raises UserError where it is of an earlier version."""
    flat = {f"{group}.{name}": tuple(value) if isinstance(value, list) else value
            for group, items in values.items() if isinstance(items, dict) for name, value in items.items()}
    for name, item in settings(Config):  # what is a list now was one value in earlier versions, or none
        if typing.get_origin(item.type) is tuple and isinstance(flat.get(name), str):
            flat[name] = (flat[name],) if flat[name] else ()
    return resolve(flat | {name: value for name, value in values.items() if not isinstance(value, dict)}, {})


def settings(group: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Each setting's dotted name and field, in config.py's order."""
    types = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(types[field.name]):
            yield from settings(types[field.name], f"{prefix}{field.name}.")
        elif field.metadata:
            yield prefix + field.name, field


def check_combinations(config: Config) -> None:
    """Refuse what no stage could do. Raises UserError naming the setting, its value and the nearest valid choice."""
    contexts, negatives, guidance = config.contexts, config.negatives, config.guidance
    if not config.paths.output:
        raise UserError("paths.output: is empty; give the folder that everything is written to")
    for name in ("paths.run", "contexts.name", "fr.name", "training.name"):
        if (path := PurePath(attrgetter(name)(config))).is_absolute() or ".." in path.parts:
            raise UserError(f"{name}: '{path}' lies outside paths.output; give a name, and set paths.output for another place")
    if contexts.source == "published" and not contexts.file:
        raise UserError("contexts.file: is empty, but contexts.source=published reads it; give the contexts file")
    if contexts.source == "extracted" and not (contexts.faces and contexts.recogniser):
        empty = "contexts.recogniser" if contexts.faces else "contexts.faces"
        raise UserError(f"{empty}: is empty, but contexts.source=extracted needs it; give it")
    if contexts.source in ("uniform", "gaussian"):
        for name in ("negatives.pool", "sampling.identities"):
            if (number := attrgetter(name)(config)) > contexts.number:
                raise UserError(f"{name}: {number} is more than contexts.number={contexts.number}; "
                                f"lower it to {contexts.number} or raise contexts.number")
    if negatives.strategy == "custom" and not negatives.custom_file:
        raise UserError("negatives.custom_file: is empty, but negatives.strategy=custom reads it; give the CSV")
    if len(guidance.interval) != 2 or guidance.interval[0] > guidance.interval[1]:
        raise UserError(f"guidance.interval: {guidance.interval} is not a lowest and a highest timestep; "
                        "give two numbers such as 200,800")
    band = config.align.band
    if band and (len(band) != 2 or band[0] >= band[1]):
        raise UserError(f"align.band: {band} is not a lowest and a highest cosine; give two numbers such as 0.3,0.8, or none")


def help_text(doc: str, reads: Collection[str] = (), choices: Choices | None = None) -> str:
    """The script's docstring and the settings it reads with their defaults, choices, units and the paper's values."""
    lines = [doc.strip(), "", "usage: python <script>.py [--preset NAME] [group.name=value ...] [--traceback]",
             f"presets: {', '.join(PRESETS)} (default: {DEFAULT_PRESET}); add yours in config/config.py", ""]
    for name, field in settings(Config):
        if reads and "." in name and name.partition(".")[0] not in reads:
            continue
        about = field.metadata
        allowed = tuple((choices or {}).get(name) or about["choices"] or ())
        notes = [f"default {_text(field.default)}"]
        notes += [f"one of {', '.join(allowed)}"] if allowed else []
        notes += [f"unit: {about['unit']}"] if about["unit"] else []
        notes += [f"paper: {_text(about['paper'])}"] if about["paper"] is not None else []
        lines += [f"  {name}", f"      {about['help']}", f"      [{'; '.join(notes)}]"]
    return "\n".join(lines)


def _build(group: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    types = typing.get_type_hints(group)
    chosen = {}
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(types[field.name]):
            chosen[field.name] = _build(types[field.name], values, f"{prefix}{field.name}.")
        elif prefix + field.name in values:
            chosen[field.name] = values[prefix + field.name]
    return group(**chosen)


def _expanded(name: str, value: Any) -> Any:
    """A value with `~` at the beginning of its texts replaced. Raises UserError where that is nobody's home."""
    if isinstance(value, tuple):
        return tuple(_expanded(name, item) for item in value)
    value = os.path.expanduser(value) if isinstance(value, str) else value
    if isinstance(value, str) and value.startswith("~"):
        raise UserError(f"{name}: '{value}' is in the home of an unknown user; write the whole path")
    return value


def _parse(name: str, text: str, field: dataclasses.Field) -> Any:
    kind = field.type
    try:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            text = text.strip()
            text = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text  # a folder's name may end with a bracket
            return tuple(_parse_item(part.strip(), item) for part in text.split(",") if part.strip())
        return _parse_item(text, kind)
    except (ValueError, KeyError):
        raise UserError(f"{name}: '{text}' is not {_kind(kind)}; the default is {_text(field.default)}") from None


def _parse_item(text: str, kind: type) -> Any:
    return BOOLEANS[text.lower()] if kind is bool else kind(text)


def _check_value(name: str, value: Any, field: dataclasses.Field, choices: Sequence[str] | None) -> None:
    kind, about = field.type, field.metadata
    items, item_kind = (value, typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else ((value,), kind)
    if not isinstance(items, tuple) or any(
            type(item) is not item_kind and not (item_kind is float and type(item) is int) for item in items):
        raise UserError(f"{name}: {value!r} is not {_kind(kind)}; the default is {_text(field.default)}")
    for item in items:
        if choices and item not in choices:
            raise UserError(f"{name}: '{item}' is not one of its choices; {_nearest(item, choices)}")
        if item_kind is float and not math.isfinite(item):
            raise UserError(f"{name}: {item} is not finite; the default is {_text(field.default)}")
        if about["minimum"] is not None and item < about["minimum"]:
            raise UserError(f"{name}: {item} is too small; the minimum is {about['minimum']}")
        if about["maximum"] is not None and item > about["maximum"]:
            raise UserError(f"{name}: {item} is too large; the maximum is {about['maximum']}")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    """`did you mean X?`, matching the last part of a dotted name too, or the list of what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        last_parts = {option.rpartition(".")[2]: option for option in known}
        near = [last_parts[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1)]
    if near:
        return f"did you mean {near[0]}?"
    return f"the choices are {', '.join(known)}" if len(known) < 20 else "--help lists them all"


def _kind(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__} separated by commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value) if value != "" else "empty"
