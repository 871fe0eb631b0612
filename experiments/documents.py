"""What experiments write into the repository's documents: all that stands between two comments that name the experiment."""
from pathlib import Path

from utils.runtime.errors import UserError
from utils.runtime.files import write_text

ROOT = Path(__file__).parents[1]


def markers(experiment: str) -> tuple[str, str]:
    """The comments below and above which the text of `experiment`, a module's name, stands."""
    below, above = (f"<!-- {side}: written by python -m experiments.{experiment} --docs -->" for side in ("below", "above"))
    return below, above


def write_between(document: str, experiment: str, text: str) -> None:
    """Replace what stands in a document (its path in the repository) between the markers of `experiment`.

    Raises:
        UserError: the document is not there, or lacks a marker.
    """
    before, after = around(document, experiment)
    below, above = markers(experiment)
    write_text(ROOT / document, f"{before}{below}\n{text}{above}{after}")


def around(document: str, experiment: str) -> tuple[str, str]:
    """What stands in a document above the markers of `experiment`, and what below.

    Raises:
        UserError: as `write_between`.
    """
    file, (below, above) = ROOT / document, markers(experiment)
    found = file.read_text(encoding="utf-8") if file.is_file() else ""
    before, _, rest = found.partition(below)
    _, end, after = rest.partition(above)
    if not end:
        raise UserError(f"{file}: lacks one of the comments between which --docs writes; restore {below} and {above}")
    return before, after
