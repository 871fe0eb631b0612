"""What is wrong with how a trial ended."""
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.processes import Ended
from tests.faults.stages import copy

LIMIT, MOST_MEMORY = 60, 4 * 2**30  # seconds that a command may take, bytes
COLUMNS = ("lost", "wrong", "tracebacks", "hangs", "messages", "programs", "crashes", "outside", "memory")
NOISE = "[^\r\n]*(Warning|Exception ignored|terminate called)[^\r\n]*"
Result = tuple[str, str, Counter]  # stage or format, fault, how much was wrong in which column
Trial = Callable[[], Result]


def flaws(ended: Ended, codes: tuple[int, ...] = (0, 2), names: tuple[str, ...] = ()) -> Counter:
    """What is wrong with how a command ended.

    Args:
        codes: that it may have.
        names: one of these must be in the message of what is refused.
    """
    expected = 0 if ended.code in (0, -9) else 1
    is_said = len(ended.errors) == expected and all(
        "; " in line and len(line) < 1200 and (not names or any(name in line for name in names)) for line in ended.errors)
    is_noisy = re.search(NOISE, ended.printed)
    return Counter(
        tracebacks=int("Traceback" in ended.printed or ended.code == 1), programs=len(ended.programs), outside=len(ended.outside),
        hangs=int(ended.seconds > LIMIT) + len(ended.orphans), memory=int(ended.peak > MOST_MEMORY),
        crashes=int(ended.code < 0 and ended.code not in codes), messages=int(
            not is_said or bool(is_noisy) or ended.code >= 0 and ended.code not in (*codes, 1)))


def compared(reference: dict[str, str], found: dict[str, str]) -> Counter:
    return Counter(lost=len(reference.keys() - found.keys()), wrong=sum(
        found.get(file, digest) != digest for file, digest in reference.items()))


def show(bad: Counter, what: str, *ended: Ended) -> Counter:
    """Say what went wrong in a trial."""
    if bad.total():
        noise = [" ".join(match[0] for match in re.finditer(NOISE, command.printed))[:300] for command in ended]
        print(f"{what}: {dict(+bad)}", *(f"    {command.code} {command.programs or ''} {command.outside or ''} {heard} "
              f"{command.printed.strip()[-600:]}" for command, heard in zip(ended, noise, strict=True)), sep="\n", flush=True)
    return bad


class trial_folder:
    """A copy of a folder, removed at the end."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(dir=self.source.parent))
        return copy(self.source, self.folder / "trial")

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder)
