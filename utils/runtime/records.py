"""Is this already made? A JSON record beside every target says what decided it."""
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from utils.runtime.errors import UserError
from utils.runtime.files import file_digest, read_json, require_file, sweep, write_json

DIGEST = re.compile("[0-9a-f]{64}")
MOST_BYTES = 2**50  # of a target
FORMAT = 2  # of records; those of format 1 called settings by their last name alone
PACKAGES = ("torch", "torchvision", "diffusers", "numpy", "opencv-python-headless")  # their versions can change a result


class State(Enum):
    MAKE = "nothing of it is there, or what is there was made otherwise"
    CONTINUE = "it was begun with the same settings"
    DONE = "it is complete"


@dataclass(frozen=True)
class Record:
    """What decided a target, as a JSON file beside it."""

    file: Path  # the record: beside a target file, or inside a target folder
    decides: Mapping[str, Any]  # settings by their dotted names, and digests of what the target is made from
    # The setting that names the target, so that other settings can have a target of their own. Empty: the target is a cache,
    # which is made again where anything that decides it has changed.
    named_by: str = ""
    target: Path | None = None  # a file that is complete as soon as it exists; None: a folder, completed file by file
    contents: Path | None = None  # what a target folder never holds before its record is there
    may_change: Mapping[str, Any] = field(default_factory=dict)  # when the target is continued; the record keeps the latest
    sources: Sequence[Path | str] = ()  # what it is made from and later stages do not read: see check_sources

    def state(self) -> State:
        """What is left to do; what killed processes left is swept.

        Raises:
            UserError: the target exists and was made otherwise; the line names the first setting that differs and the
                one to change.
        """
        sweep(self.file.parent)
        kept = self.target or self.contents
        if not self.file.is_file() and self.named_by and kept is not None and holds_something(kept):
            raise UserError(f"{kept}: has no record of how it was made ({self.file.name} is gone); {self._fix()}")
        if not self.file.is_file() or (self.target is not None and not self.target.exists()):
            return State.MAKE
        earlier = self._read()
        difference = first_difference(self._plain(self.decides), earlier)
        if difference is None and not self._is_as_made(earlier):
            return State.MAKE
        if difference is None:
            return State.CONTINUE if self.target is None else State.DONE
        if not self.named_by:
            return State.MAKE
        name, before, now = difference
        if earlier.get("format") != FORMAT:
            raise UserError(f"{self._where()}: was begun by an earlier version, which recorded {name} otherwise; finish it "
                            f"with that version, or {self._fix()}")
        if all(isinstance(value, str) and DIGEST.fullmatch(value) for value in (before, now)):
            raise UserError(f"{self._where()}: was made from another content of {name} than there is now; {self._fix()}")
        raise UserError(f"{self._where()}: was made with {name} = {before!r}, now it is {now!r}; {self._fix()}")

    @contextmanager
    def making(self, *beside: Path, **about: Any) -> Iterator[bool]:
        """`begin`, and whether the target is to be made; then the record notes what is in it, and in the files `beside` it.

        Processes that make something in one folder do it in turn, so that a record never tells of another's target.
        """
        with alone(self.file.parent):
            is_new = self.begin(**about) is not State.DONE
            yield is_new
            if is_new:
                made = {file.name: [*seen(file), file_digest(file, MOST_BYTES)] for file in (self.target, *beside)}
                write_json(self.file, self._read() | {"made": made})

    def begin(self, **about: Any) -> State:
        """Write the record before the target; a stale target is removed first, so a kill never leaves the two at odds.

        Args:
            about: what else is worth keeping: the whole resolved config, digests of what comes out.
        Raises:
            UserError: as `state`.
        """
        with alone(self.file.parent):  # of two that begin one target with different settings, the second is refused
            return self._begin(about)

    def _begin(self, about: Mapping[str, Any]) -> State:
        state = self.state()
        changes = self._plain(self.may_change)
        if state is State.CONTINUE and self._read().get("may_change", {}) == changes:
            return state
        if state is State.MAKE and self.target is not None:
            self.target.unlink(missing_ok=True)
        if state is not State.DONE:
            sources = {os.path.relpath(Path(source).resolve(), self.file.parent.resolve()): {  # a project may be moved
                "sha256": file_digest(source), "seen": seen(Path(source))} for source in self.sources}
            write_json(self.file, {"format": FORMAT, "decides": self._plain(self.decides), "may_change": changes, **about,
                                   "sources": sources, "versions": versions()})
        return state

    def _read(self) -> dict[str, Any]:
        record = read_json(self.file)
        if isinstance(record, dict) and isinstance(record.get("decides"), dict):
            return record
        if self.named_by:
            raise UserError(f"{self.file}: is no record of how {self._where()} was made; {self._fix()}")
        return {"decides": {}}

    def _is_as_made(self, record: Mapping[str, Any]) -> bool:
        """Whether the files are those that the record notes: by their stamps, or by their contents where these differ."""
        made = record.get("made", {})
        try:
            files = {self.file.with_name(name): noted for name, noted in made.items()}
            return all(file.is_file() and (seen(file) == noted[:-1] or file.stat().st_size == noted[1] and file_digest(
                file, MOST_BYTES) == noted[-1]) for file, noted in files.items())
        except (AttributeError, TypeError, ValueError, IndexError):  # it is damaged
            return False

    @staticmethod
    def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(values))  # as they come back from the file: tuples are lists there

    def _where(self) -> Path:
        return self.target or self.file.parent

    def _fix(self) -> str:
        return f"set {self.named_by} to another name, or delete that {'file' if self.target else 'folder'}"


_held: set[Path] = set()  # folders in which this process is alone


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder. Where locks do not work, as on some networks, do not."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(folder)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if os.environ.get("RANK", "0") == "0":  # the other ranks wait for this one
                    print(f"{folder}: another process makes something here; this one waits", flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _held.discard(folder)
        os.close(descriptor)


def holds_something(path: Path) -> bool:
    """Whether there is such a file, or such a folder with a visible entry."""
    return any(not entry.name.startswith(".") for entry in path.iterdir()) if path.is_dir() else path.exists()


def first_difference(decides: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting in which a record differs from `decides`: its name, the record's value and today's."""
    earlier = record["decides"]
    if record.get("format") != FORMAT:
        dotted = {name.rpartition(".")[2]: name for name in decides}
        earlier = {dotted.get(name, name): value for name, value in earlier.items()}
    for name in sorted(decides.keys() | earlier.keys()):
        if decides.get(name) != earlier.get(name):
            return name, earlier.get(name), decides.get(name)
    return None


def note(file: Path, **about: Any) -> None:
    """Add to a record, if there is one, what came out."""
    if file.is_file():
        write_json(file, read_json(file) | about)


def noted(file: Path, name: str, otherwise: Any = None) -> Any:
    """What was added to a record; `otherwise` where it is not said, or there is no record."""
    record = read_json(file) if file.is_file() else {}
    return record.get(name, otherwise) if isinstance(record, dict) else otherwise


def decided(file: Path, names: Sequence[str], fix: str) -> dict[str, Any]:
    """What decided the target of an earlier stage, by its record.

    Args:
        names: what the record must say.
    Raises:
        UserError: there is no such record, it is damaged, or it does not say all of this.
    """
    record = read_json(require_file(file, "the record of an earlier stage", fix))
    decides = record.get("decides") if isinstance(record, dict) else None
    for name in names:
        if not isinstance(decides, dict) or name not in decides:
            raise UserError(f"{file}: does not say what {name} was; {fix}")
    return decides


def check_digest(target: Path, digest: str) -> None:
    """Raises UserError where the record beside a file, if there is one, tells of another content."""
    record = target.with_suffix(".json")
    if noted(record, "digest", digest) != digest:
        raise UserError(f"{target}: is not the file that {record.name} tells of; delete it, and run its stage again")


def check_sources(target: Path, stage: str) -> None:
    """Raises UserError where a file that `target` was made from has changed since; one that is gone may be elsewhere.

    Args:
        target: a file whose record, if there is one, lies beside it.
        stage: the script that makes it.
    """
    record = target.with_suffix(".json")
    recorded = read_json(record) if record.is_file() else {}
    sources = recorded.get("sources", {}) if isinstance(recorded, dict) else None
    if not isinstance(sources, dict) or not all(isinstance(said, dict) for said in sources.values()):
        raise UserError(f"{record}: is no record of how {target} was made; delete both, and run {stage} again")
    for name, said in sources.items():
        source = Path(os.path.normpath(record.parent.resolve() / name))
        if source.is_file() and seen(source) != said.get("seen") and file_digest(source) != said.get("sha256"):
            raise UserError(f"{source}: has changed since {target} was made from it; put the earlier file back, or delete "
                            f"{target} and run {stage} again")


def seen(file: Path) -> list[int]:
    """Inode, size and times, ns: while these stay, a file need not be read again."""
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def versions() -> dict[str, str]:
    """The versions that can change a result."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
