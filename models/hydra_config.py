"""A published model's `.hydra/config.yaml`: a stranger's file, checked before OmegaConf resolves what is asked of it."""
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.state_dicts import DOWNLOAD
from utils.runtime.errors import UserError
from utils.runtime.files import require_file

MOST_BYTES, MOST_NODES, DEEPEST = 64 * 1024, 1000, 8
RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)  # `${oc.env:HOME}` and `${oc.${x}:HOME}` call something, `${a.b}` does not
INTERPOLATION = re.compile(r"(\\*)\$\{")


class HydraConfig:
    """config["constants.image_size"] is that value, its interpolations resolved.

    Only what is asked for is resolved, since elsewhere such a file refers to the paths and clock of its own run.

    Raises:
        UserError: the file is missing, is not plain YAML, or is larger or deeper than any model's; a value asked for is
            missing or cannot be resolved.
    """

    def __init__(self, file: Path) -> None:
        self.file = require_file(file, "the diffusion model's configuration", DOWNLOAD)
        try:
            values = yaml.safe_load(self._checked_text())
            self.config = OmegaConf.create(without_resolvers(values) if isinstance(values, dict) else {})
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, OmegaConfBaseException, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: is not the plain YAML of a model ({reason}); {DOWNLOAD}") from None

    def __getitem__(self, path: str) -> Any:
        try:
            value = OmegaConf.select(self.config, path, throw_on_missing=True)
            if isinstance(value, DictConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            elif OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, RecursionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise self.error(path, f"cannot be resolved ({reason}); write the value there, or {DOWNLOAD}") from None
        if value is None:
            raise self.error(path, f"is missing; write the value there, or {DOWNLOAD}")
        if "${" in str(value):
            raise self.error(path, f"'{value}' cannot be resolved without calling something; write the value there, or "
                             f"{DOWNLOAD}")
        return value

    def error(self, path: str, message: str) -> UserError:
        return UserError(f"{self.file}: {path}: {' '.join(message.split())}")  # a value may have several lines

    def _checked_text(self) -> str:
        """The file's text. Raises ValueError where it is not plain, or too large or too deep to be a model's."""
        if self.file.stat().st_size > MOST_BYTES:
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
    """The values with `${` escaped in every text that may call something: OmegaConf then gives it back and calls nothing."""
    if isinstance(value, dict):
        return {key: without_resolvers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_resolvers(item) for item in value]
    if isinstance(value, str) and RESOLVER.search(value):
        return INTERPOLATION.sub(r"\1\1\\${", value)  # a backslash that stands there already would undo the new one
    return value
