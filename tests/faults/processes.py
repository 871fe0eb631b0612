"""Real processes to be killed, and what is left of them."""
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from utils.runtime.errors import run_script

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


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


def forked(main: Callable[[], None], *arguments: str, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run a script's main as a command of its own, without the seconds of its imports: exit code and what it printed."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
                sys.argv = ["stage.py", *arguments]
                prepare()
                run_script(main)
                code = 0
            except SystemExit as ended:
                code = ended.code
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def _stat(pid: int) -> list[str]:
    """State, parent and more of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
