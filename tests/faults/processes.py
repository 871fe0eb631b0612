"""Real processes to be killed, and what is left of them."""
import ctypes
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.runtime.errors import run_script

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def end_with_parent() -> None:
    """Whoever kills the campaign kills its trials."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs; ended ones that nobody has waited for do not."""
    return bool(_stat(pid)) and _stat(pid)[0] not in "ZX"


def children(pid: int) -> list[int]:
    """The processes that a living process has started."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _stat(int(name))[1:2] == [str(pid)]]


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: the signal it died of), what it printed, seconds, its highest memory in bytes,
    the programs that it started and the files that it wrote outside of its output, and processes that it left behind."""

    code: int
    printed: str
    seconds: float
    peak: int
    programs: list[str]
    outside: list[str]
    orphans: list[int]

    @property
    def errors(self) -> list[str]:
        return [line for line in re.split("[\r\n]+", self.printed) if line.startswith("error: ")]


SIGNALS = signal.SIGTERM, signal.SIGINT


class Forked:
    """A script's main as a command of its own, forked from this process, so without the seconds of its imports.

    Args:
        prepare: is called in the new process first; what it returns, if it can be called, when all went well.
        folder: where it runs; it may write to `out` there alone.
    """

    def __init__(self, main: Callable[[], None], *arguments: str, prepare: Callable[[], object] = lambda: None,
                 folder: Path | None = None) -> None:
        self.output, self.begin = tempfile.TemporaryFile(), time.monotonic()
        sys.stdout.flush(), sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the new process listens
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return
        code, finish = 99, None
        try:
            os.setsid()
            end_with_parent()
            os.dup2(self.output.fileno(), 1), os.dup2(self.output.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            sys.argv = ["stage.py", *arguments]
            if folder:
                os.chdir(folder)
                watch(f"{folder}/out")

            def begin() -> None:
                nonlocal finish
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                finish = prepare()
                main()
            run_script(begin)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            sys.setprofile(None)
            if code == 0 and callable(finish):
                finish()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def wait(self, sent: signal.Signals | None = None, after: float = 0.0, limit: float = 70.0) -> Ended:
        """Send it a signal `after` seconds, unless it has ended; kill it at the limit."""
        usage = self._wait_until(self.begin + (after if sent else limit))
        if usage is None and sent:
            os.kill(self.pid, sent)
            usage = self._wait_until(time.monotonic() + limit)
        if usage is None:
            os.kill(self.pid, signal.SIGKILL)
            usage = os.wait4(self.pid, 0)
        seconds = time.monotonic() - self.begin
        wait_until(lambda: not members(self.pid), 3)
        if orphans := members(self.pid):
            os.killpg(self.pid, signal.SIGKILL)
        with self.output as output:
            output.seek(0)
            lines = output.read().decode(errors="backslashreplace").splitlines(keepends=True)
        noted = {kind: [line for line in lines if line.startswith(f"{kind}: ")] for kind in NOTED}
        printed = "".join(line for line in lines if not line.startswith(tuple(f"{kind}: " for kind in NOTED)))
        return Ended(os.waitstatus_to_exitcode(usage[1]), printed, seconds, 1024 * usage[2].ru_maxrss, *noted.values(), orphans)

    def _wait_until(self, deadline: float) -> tuple | None:
        while True:
            usage = os.wait4(self.pid, os.WNOHANG)
            if usage[0]:
                return usage
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)


def forked(main: Callable[[], None], *arguments: str, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """The exit code of a script's main as a command of its own, and what it printed."""
    ended = Forked(main, *arguments, prepare=prepare).wait()
    return ended.code, ended.printed


NOTED = ("started a program", "wrote outside")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def watch(output: str) -> None:
    """From here on this process notes the programs that it starts, and what it writes outside of `output` (and /dev)."""
    def hook(event: str, arguments: tuple) -> None:
        if event in STARTS:
            os.write(2, f"\n{NOTED[0]}: {arguments[0]!r:.200}\n".encode(errors="replace"))
        is_written = event in WRITES or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        path = arguments[1 if event in ("os.rename", "os.link", "os.symlink") else 0] if is_written else None
        if isinstance(path, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(path))
            if not path.startswith((output, "/dev/")):
                os.write(2, f"\n{NOTED[1]}: {path!r:.200}\n".encode(errors="replace"))
    sys.addaudithook(hook)


def members(session: int) -> list[int]:
    """The living processes of a session."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _stat(int(name))[3:4] == [str(session)]
            and is_alive(int(name))]


def _stat(pid: int) -> list[str]:
    """State, parent and more of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
