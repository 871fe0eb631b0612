"""A published model's `.hydra/config.yaml`: a stranger's file, checked before OmegaConf resolves what is asked of it."""
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from models.state_dicts import DOWNLOAD
from utils.runtime.errors import UserError, is_out_of_memory
from utils.runtime.files import require_file
from utils.runtime.foreign_arrays import require_regular

MOST_BYTES, MOST_NODES, DEEPEST = 64 * 1024, 1000, 8
MOST_EXPANSIONS, LONGEST = 1000, 1000  # interpolations that one value may take, and characters of a text with some
RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)  # `${oc.env:HOME}` and `${oc.${x}:HOME}` call something, `${a.b}` does not
INTERPOLATION = re.compile(r"(\\*)\$\{")
INNERMOST = re.compile(r"\$\{([^${}]*)\}")


class HydraConfig:
    """config["constants.image_size"] is that value, its interpolations resolved.

    Only what is asked for is resolved, since elsewhere such a file refers to the paths and clock of its own run.

    Raises:
        UserError: the file is missing, is not plain YAML, or is larger or deeper than any model's; a value asked for is
            missing or cannot be resolved.
    """

    def __init__(self, file: Path) -> None:
        self.file = require_file(file, "the diffusion model's configuration", f"{DOWNLOAD}, or correct model.diffusion")
        try:
            values = yaml.safe_load(self._checked_text())
            self.values = without_resolvers(values) if isinstance(values, dict) else {}
            self.config = OmegaConf.create(self.values)
        except UserError:
            raise
        except Exception as error:  # YAML's, OmegaConf's, and Python's about numbers and depths
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{file}: is not the plain YAML of a model ({reason}); {DOWNLOAD}") from None

    def __getitem__(self, path: str) -> Any:
        try:
            self._check_expansions(f"${{{path}}}", MOST_EXPANSIONS, ())
            value = OmegaConf.select(self.config, path, throw_on_missing=True)
            if isinstance(value, DictConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            elif OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            text = str(value)
        except Exception as error:  # OmegaConf's, its parser's, or Python's about numbers and depths
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0][:200]
            raise self.error(path, f"cannot be resolved ({reason}); write the value there, or {DOWNLOAD}") from None
        if value is None:
            raise self.error(path, f"is missing; write the value there, or {DOWNLOAD}")
        if "${" in text:
            raise self.error(path, f"'{text}' cannot be resolved without calling something; write the value there, or "
                             f"{DOWNLOAD}")
        return value

    def _check_expansions(self, value: Any, left: int, within: tuple[str, ...]) -> tuple[int, str]:
        """How many of the interpolations `left` remain after a value's are resolved, and what its text then is.

        Raises:
            ValueError: they do not suffice: interpolations that name others several times multiply; or a text is too long.
        """
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                left, _ = self._check_expansions(item, left, within)
        if not isinstance(value, str):
            return left, str(value)
        if "${" in value and len(value) > LONGEST:
            raise ValueError(f"a text with interpolations is longer than {LONGEST} characters")
        while found := INNERMOST.search(value):
            if left <= 0 or len(value) > MOST_BYTES:
                raise ValueError(f"it takes more than {MOST_EXPANSIONS} interpolations")
            left, text = left - 1, ""
            if found[1] not in within:  # a circle, which OmegaConf reports
                target = self.values
                for key in re.sub(r"\[(\w+)\]", r".\1", found[1]).split("."):
                    is_row = isinstance(target, list) and key.isdecimal() and int(key) < len(target)
                    target = target[int(key)] if is_row else target.get(key) if isinstance(target, dict) else None
                left, text = self._check_expansions(target, left, (*within, found[1]))
            value = value[:found.start()] + text.replace("${", "") + value[found.end():]
        return left, value

    def error(self, path: str, message: str) -> UserError:
        message = " ".join(message.split())  # a value may have several lines, or be long
        return UserError(f"{self.file}: {path}: {message if len(message) < 600 else f'{message[:300]} ... {message[-250:]}'}")

    def _checked_text(self) -> str:
        """The file's text. Raises ValueError where it is not plain, or too large or too deep to be a model's."""
        if require_regular(self.file) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 1024} KB")
        text, depth, nodes = self.file.read_text(encoding="utf-8"), 0, 0
        for event in yaml.parse(text, yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ValueError(f"line {line} has an alias, an anchor or a tag")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            nodes += isinstance(event, yaml.NodeEvent)
            if depth > DEEPEST or nodes > MOST_NODES:
                raise ValueError(f"line {line} is nested deeper than {DEEPEST} levels, or is beyond {MOST_NODES} nodes")
        return text


def without_resolvers(value: Any) -> Any:
    """The values with `${` escaped in every text that may call something, is relative or long: OmegaConf gives it back."""
    if isinstance(value, dict):
        return {key: without_resolvers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_resolvers(item) for item in value]
    if isinstance(value, str) and "${" in value and (len(value) > LONGEST or "${." in value or RESOLVER.search(value)):
        return INTERPOLATION.sub(r"\1\1\\${", value[:LONGEST])  # a backslash that stands there already would undo the new one
    return value
