"""From config/config.py and the command line to one checked, frozen Config."""
import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from config.config import DEFAULT_PRESET, PRESETS, Config
from utils.runtime.errors import UserError

PUBLISHED_T = 1000  # diffusion steps of every published model
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_config(doc: str, arguments: Sequence[str] | None = None) -> Config:
    """The settings of this run: config.py, then the preset, then the overrides, checked before anything is loaded.

    Args:
        doc: the script's docstring, the first part of `--help`.
        arguments: `[--preset NAME] [group.name=value ...]`; by default those of the command line.
    Raises:
        UserError: an unknown name, a wrong type, a value out of range, or an impossible combination.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        print(help_text(doc))
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
    return resolve({"preset": preset} | PRESETS[preset], overrides)


def resolve(preset: Mapping[str, Any], overrides: Mapping[str, str]) -> Config:
    """Config's defaults, overlaid by a preset's values and then by the overrides' texts. Raises UserError."""
    known = dict(settings(Config))
    values = dict(preset)
    for name, text in overrides.items():
        if name not in known:
            raise UserError(f"{name}: is no setting; {_nearest(name, known)}")
        values[name] = _parse(name, text, known[name])
    config = _build(Config, values)
    for name, field in known.items():
        _check_value(name, get(config, name), field)
    check_combinations(config)
    return config


def settings(group: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Each setting's dotted name and field, in config.py's order."""
    types = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        if dataclasses.is_dataclass(types[field.name]):
            yield from settings(types[field.name], f"{prefix}{field.name}.")
        elif field.metadata:
            yield prefix + field.name, field


def get(config: Config, name: str) -> Any:
    """The value of a setting by its dotted name."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def check_combinations(config: Config) -> None:
    """Refuse what no stage could do. Raises UserError naming the setting, its value and the nearest valid choice."""
    contexts, negatives, guidance, sampling = config.contexts, config.negatives, config.guidance, config.sampling
    if contexts.source == "published" and not contexts.file:
        raise UserError("contexts.file: is empty, but contexts.source=published reads it; give the contexts file")
    if contexts.source == "extracted" and not (contexts.faces and contexts.recogniser):
        empty = "contexts.recogniser" if contexts.faces else "contexts.faces"
        raise UserError(f"{empty}: is empty, but contexts.source=extracted needs it; give it")
    if contexts.source in ("uniform", "gaussian"):
        for name in ("negatives.pool", "sampling.identities"):
            if get(config, name) > contexts.number:
                raise UserError(f"{name}: {get(config, name)} is more than contexts.number={contexts.number}; "
                                f"lower it to {contexts.number} or raise contexts.number")
    if negatives.strategy == "custom" and not negatives.custom_file:
        raise UserError("negatives.custom_file: is empty, but negatives.strategy=custom reads it; give the CSV")
    if len(guidance.interval) != 2 or guidance.interval[0] > guidance.interval[1]:
        raise UserError(f"guidance.interval: {guidance.interval} is not a lowest and a highest timestep; "
                        "give two numbers such as 200,800")
    if sampling.as_published and sampling.solver == "dpm++":
        raise UserError("sampling.as_published: true is impossible with sampling.solver=dpm++, which the published code "
                        "does not have; set sampling.as_published=false, or sampling.solver=ddim")
    if sampling.as_published and sampling.solver == "ddpm" and sampling.steps != PUBLISHED_T:
        raise UserError(f"sampling.steps: {sampling.steps} is impossible with sampling.as_published=true and "
                        f"sampling.solver=ddpm, which runs every timestep; set sampling.steps={PUBLISHED_T}, or "
                        "sampling.as_published=false")
    check_network_sizes(config)


def check_network_sizes(config: Config) -> None:
    """Refuse sizes that no network of stage 0 can have, before hours are spent on finding faces."""
    autoencoder, diffusion, size = config.autoencoder, config.diffusion, config.training.image_size
    if len(autoencoder.channels) != 3:
        raise UserError(f"autoencoder.channels: {_text(autoencoder.channels)} are {len(autoencoder.channels)} resolutions, "
                        "but latents are a quarter of the image's size; give 3 numbers")
    for name in ("autoencoder.channels", "diffusion.initial_channels", "diffusion.context_channels"):
        value = get(config, name)
        if any(channels % 32 for channels in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name}: {_text(value)} is no multiple of 32, the groups of every norm; give multiples of it")
    if len(diffusion.attention) != len(diffusion.channel_multipliers):
        raise UserError(f"diffusion.attention: {_text(diffusion.attention)} has not one value for each of "
                        f"diffusion.channel_multipliers={_text(diffusion.channel_multipliers)}; give as many")
    halvings = 2 ** (1 + len(diffusion.channel_multipliers))  # two by the first stage, the rest by the network
    if size % halvings:
        raise UserError(f"training.image_size: {size} cannot be halved as often as the networks do; set "
                        f"{max(1, round(size / halvings)) * halvings}")


def help_text(doc: str) -> str:
    """The script's docstring and every setting with its default, choices, unit and the paper's value."""
    lines = [doc.strip(), "", "usage: python <script>.py [--preset NAME] [group.name=value ...]",
             f"presets: {', '.join(PRESETS)} (default: {DEFAULT_PRESET}); add yours in config/config.py", ""]
    for name, field in settings(Config):
        about = field.metadata
        notes = [f"default {_text(field.default)}"]
        notes += [f"one of {', '.join(about['choices'])}"] if about["choices"] else []
        notes += [f"unit: {about['unit']}"] if about["unit"] else []
        notes += [f"paper: {about['paper']}"] if about["paper"] else []
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


def _parse(name: str, text: str, field: dataclasses.Field) -> Any:
    kind = field.type
    try:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(_parse_item(part.strip(), item) for part in text.strip("()[] ").split(",") if part.strip())
        return _parse_item(text, kind)
    except (ValueError, KeyError):
        raise UserError(f"{name}: '{text}' is not {_kind(kind)}; the default is {_text(field.default)}") from None


def _parse_item(text: str, kind: type) -> Any:
    return BOOLEANS[text.lower()] if kind is bool else kind(text)


def _check_value(name: str, value: Any, field: dataclasses.Field) -> None:
    kind, about = field.type, field.metadata
    items, item_kind = (value, typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else ((value,), kind)
    if not isinstance(items, tuple) or any(
            type(item) is not item_kind and not (item_kind is float and type(item) is int) for item in items):
        raise UserError(f"{name}: {value!r} is not {_kind(kind)}; the default is {_text(field.default)}")
    for item in items:
        if about["choices"] and item not in about["choices"]:
            raise UserError(f"{name}: '{item}' is no choice; {_nearest(item, about['choices'])}")
        if item_kind is float and not math.isfinite(item):
            raise UserError(f"{name}: {item} is not finite; the default is {_text(field.default)}")
        if about["minimum"] is not None and item < about["minimum"]:
            raise UserError(f"{name}: {item} is too small; the least is {about['minimum']}")
        if about["maximum"] is not None and item > about["maximum"]:
            raise UserError(f"{name}: {item} is too large; the most is {about['maximum']}")


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
