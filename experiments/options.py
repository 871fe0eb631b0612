"""Command lines of the studies: options of their own, and settings for the stages."""
import argparse
import sys

from utils.runtime.errors import UserError


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments that are settings (name=value). Raises UserError where an argument is neither."""
    settings = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("--")]
    options, rest = parser.parse_known_args([argument for argument in sys.argv[1:] if argument not in settings])
    if rest:
        raise UserError(f"{rest[0]}: is not understood; see --help")
    return options, settings
