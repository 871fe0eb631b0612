"""How every script ends otherwise than well: in one line that names the file or setting, what is wrong and the fix.

Exit codes: 2 what the user can put right, 130 Ctrl-C, 143 SIGTERM, 1 a bug.
"""
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

STOPS = (signal.SIGINT, signal.SIGTERM)
PARENT = os.getppid()  # early, so that ranks can tell whether torchrun died while they were starting
ROOT = Path(__file__).parents[2]
HEARING = 1.0  # seconds that a rank gives another, which it has lost, to say why
LONGEST = 300  # characters of a file's name, or of another's message, that a line shows
AGAIN = "run the same command again: it continues"
NO_SPACE = f"free space or choose another paths.output, then {AGAIN}"
NOT_ALLOWED = "this user may not read or write there: change its permissions, or choose another path (results: paths.output)"
NO_PLACE = "this path cannot be used so: choose another (results: paths.output)"
FIXES = {
    errno.ENOSPC: NO_SPACE, errno.EDQUOT: NO_SPACE,
    errno.EFBIG: f"raise the limit on the size of files (ulimit -f) or choose another paths.output, then {AGAIN}",
    errno.EROFS: NOT_ALLOWED, errno.EACCES: NOT_ALLOWED, errno.EPERM: NOT_ALLOWED,
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO), NO_PLACE),
    errno.ENOENT: f"it is missing, or has vanished meanwhile: put it back or make it again, then {AGAIN}",
    errno.EMFILE: f"raise the limit on open files (ulimit -n), then {AGAIN}",
    errno.EPIPE: f"who read this output has gone: write it to a file instead, then {AGAIN}",
}
LESS_MEMORY = ("lower sampling.batch_size, fr.batch_size, diffusion.batch_size or align.processes, and where that is refused "
               "for what was begun, give it another name (paths.run, fr.name, training.name)")
WORKER_KILLED = ("a worker process was killed (out of memory?); set align.processes (when training, the environment's "
                 f"OMP_NUM_THREADS) lower and {AGAIN}")


class UserError(Exception):
    """Something the user can fix. Its message is one line: `<file or setting>: <what is wrong>; <the fix>`."""


class Terminated(BaseException):
    """SIGTERM has come: like Ctrl-C, it passes every `except Exception`, so that `with` blocks finish the file in hand."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`; whatever it fails with ends in one line on stderr and the exit code that fits.

    `--traceback` among the arguments is taken out of them; only then the traceback is printed too.
    """
    listen()
    shows_traceback = "--traceback" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        main()
        sys.stdout.flush()  # while a failure can still be told
        _ignore_stops()  # it is done, though the interpreter takes a moment to end
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if shows_traceback:
            traceback.print_exception(error)
        sys.exit(tell(error))


def listen() -> None:
    """From here on SIGTERM raises Terminated, what nobody catches is one line, and any file name can be printed.

    A script may call this before its imports, which take seconds.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8
    warnings.filterwarnings("ignore", "tqdm:disabling monitor")  # it does without, where no thread can be started
    _Signals.stopped_by = None
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable


def tell(error: BaseException) -> int:
    """Print the one line of what a script ended with, and give the exit code. Signals are ignored from here on."""
    _ignore_stops()
    error = _Signals.stopped_by() if _Signals.stopped_by else error  # a signal may come out as another error of what it stopped
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more; without this the interpreter would try again, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code, line = explain(error)
    line = " ".join(line.split())
    if _has_lost_a_rank(error):
        time.sleep(HEARING)
    if _is_first_to_tell(code):
        print(f"error: {line}", file=sys.stderr, flush=True)
    if code in (1, 2) and not _has_lost_a_rank(error):
        _report_to_torchrun(line)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an exception."""
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {AGAIN}"
    if isinstance(error, Terminated):
        return 143, f"terminated; {AGAIN}"
    if isinstance(error, UserError):
        return 2, str(error)
    message = _first_line(error)
    if is_out_of_memory(error):
        return 2, f"out of memory ({message or type(error).__name__}); {LESS_MEMORY}"
    if isinstance(error, OSError) and error.errno is not None:
        return 2, f"{_file_of(error)}: {error.strerror}; {FIXES.get(error.errno, f'check that file and its disk, then {AGAIN}')}"
    if instead := worker_error(error):
        return explain(instead)
    if _has_lost_a_rank(error):
        return 2, (f"rank {os.environ['RANK']}: another rank was killed (out of memory?), or ended on another node, where its "
                   f"own line says why; {AGAIN}")
    return 1, (f"{Path(sys.argv[0]).name}: {type(error).__name__}: {message} at {_place(error.__traceback__)}; a bug: run again "
               "with --traceback and report it")


def worker_error(error: BaseException) -> BaseException | None:
    """What to raise in place of a DataLoader's complaint that a worker process has ended."""
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
        return None
    # a SIGTERM to the whole group may reach a worker first
    return Terminated() if "Terminated" in f"{error} {error.__cause__}" else UserError(WORKER_KILLED)


def _has_lost_a_rank(error: BaseException) -> bool:
    return (isinstance(error, RuntimeError) and "RANK" in os.environ
            and bool(re.search("gloo|nccl|connection (closed|reset)", _first_line(error), re.I)))


def _is_first_to_tell(code: int) -> bool:
    """Whether this process says what it ended with: of the ranks that one torchrun started, the first to end does."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of this launch>/<rank>/error.json
    if not file:
        return code in (1, 2) or os.environ.get("RANK", "0") == "0"
    with suppress(OSError):
        try:
            os.close(os.open(Path(file).parent.parent / "told", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    return True


def _report_to_torchrun(line: str) -> None:
    """Leave the line for torchrun, which ends with a long report and quotes it there, second to last."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": {"message": f"error: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(f"{file}.part").write_text(json.dumps(said))
            os.replace(f"{file}.part", file)  # whole or not at all: torchrun fails on others


class _Signals:
    stopped_by: type[BaseException] | None = None  # what the last signal raised
    are_held = False


def _stop(number: int, frame: object) -> None:
    _Signals.stopped_by = KeyboardInterrupt if number == signal.SIGINT else Terminated
    if not _Signals.are_held:
        raise _Signals.stopped_by


@contextmanager
def hold_stops() -> Iterator[None]:
    """Let signals that stop a script wait until the block is left.

    Processes that are started in it do not get them until they unblock them.
    """
    _Signals.stopped_by, _Signals.are_held = None, True
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        _Signals.are_held = False
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if _Signals.stopped_by:
        raise _Signals.stopped_by


def _ignore_stops() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)  # of _unraisable
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: only signals during the imports come here; nothing is in hand yet."""
    if not issubclass(kind, KeyboardInterrupt | Terminated):
        sys.__excepthook__(kind, error, trace)
        return
    os._exit(tell(error))


def _unraisable(about: "sys.UnraisableHookArgs") -> None:
    """sys.unraisablehook: a signal that came where nothing can be raised, as in a destructor, comes again a little later.

    So does, by itself, a lack of memory; what a destructor could not do for it needs no line.
    """
    if about.exc_value is not None and is_out_of_memory(about.exc_value):
        return
    if not isinstance(about.exc_value, KeyboardInterrupt | Terminated):
        sys.__unraisablehook__(about)
        return
    number = signal.SIGINT if isinstance(about.exc_value, KeyboardInterrupt) else signal.SIGTERM
    signal.signal(signal.SIGALRM, lambda *_: _stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    is_of_worker = lines[0].startswith("Caught ")  # a traceback follows, whose error comes last
    return lines[-1 if is_of_worker else 0][:LONGEST]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of the device or of the host."""
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = ("out of memory|can't allocate memory|cannot allocate memory|not enough memory|insufficient memory|std::bad_alloc|"
             "could not create a (primitive|memory)|can't start new thread|"  # oneDNN's and Python's
             r"exception occurred : \(\)")  # a MemoryError in load_state_dict, which keeps its arguments: none
    return isinstance(error, Exception) and not isinstance(error, OSError) and bool(re.search(words, str(error), re.I))


def _file_of(error: OSError) -> str:
    name = error.filename
    if name is None or isinstance(name, int):
        return "output"
    name = os.fsdecode(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[-LONGEST // 2 :]}"


def _place(trace: TracebackType | None) -> str:
    """File and line of the project's innermost frame."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if frame.filename.startswith(f"{ROOT}/") and "site-packages" not in frame.filename]
    last = (own or frames or [traceback.FrameSummary("?", 0, "?")])[-1]
    return f"{last.filename.removeprefix(f'{ROOT}/')}:{last.lineno}"
