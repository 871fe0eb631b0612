"""Whatever a script ends with: one line, an exit code that says what kind it is, and a traceback only where it is asked for."""
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils.runtime import errors
from utils.runtime.errors import Terminated, UserError, run_script

AGAIN = "run the same command again: it continues"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """run_script belongs to a whole process: what it sets is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py", "a.b=1"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    errors._Signals.stopped_by = None


@pytest.fixture
def ended(capsys):
    """(error or main) -> the exit code and what stood on stderr."""
    def end(main) -> tuple[int, str]:
        def fail() -> None:
            raise main
        with pytest.raises(SystemExit) as exit:
            run_script(fail if isinstance(main, BaseException) else main)
        captured = capsys.readouterr()
        assert captured.out == ""
        return exit.value.code, captured.err
    return end


def test_a_script_that_ends_well_says_nothing(capsys):
    run_script(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_what_the_user_can_fix_is_its_own_line(ended):
    assert ended(UserError("a.b: is\n  wrong; fix it")) == (2, "error: a.b: is wrong; fix it\n")


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "No space left on device; free space or choose another paths.output"),
    (errno.EDQUOT, "free space or choose another paths.output"),
    (errno.EFBIG, "File too large; raise the limit on the size of files (ulimit -f)"),
    *((number, "may not read or write there") for number in (errno.EROFS, errno.EACCES, errno.EPERM)),
    *((number, "this path cannot be used so: choose another") for number in (
        errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)),
    (errno.ENOENT, "vanished"), (errno.EIO, "check that file and its disk"), (errno.EMFILE, "ulimit -n")])
def test_an_os_error_names_the_file_and_a_fix_that_fits(ended, number, words):
    code, line = ended(OSError(number, os.strerror(number), "/data/out/x.png"))
    assert code == 2 and line.startswith(f"error: /data/out/x.png: {os.strerror(number)}; ") and line.count("\n") == 1
    assert words in line
    assert ("free space" in line) == (number in (errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize("name, shown", [
    (None, "output"), (7, "output"), (b"caf\xe9", "caf\\udce9"), ("caf\udce9\nx", "caf\\udce9 x"),
    ("/" + "a" * 5000, "/" + "a" * 149 + "..." + "a" * 150)])
def test_any_file_name_can_be_told(ended, name, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
    monkeypatch.setattr(sys, "stderr", stream)
    ended(OSError(errno.EIO, "broken", name))
    assert stream.buffer.getvalue().decode("ascii").startswith(f"error: {shown}: broken; ")


def test_a_real_failed_write_is_told(ended, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, line = ended(lambda: (tmp_path / "out" / "run").mkdir(parents=True))
    assert code == 2 and line.startswith(f"error: {tmp_path / 'out' / 'run'}: Not a directory; ")


@pytest.mark.parametrize("error, heard", [
    (MemoryError(), ""), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ""), (ValueError("x"), "ValueError: x")])
def test_where_nothing_can_be_raised_a_lack_of_memory_is_no_noise(capsys, error, heard):
    class Held:
        def __del__(self) -> None:
            raise error

    errors.listen()
    Held()
    assert heard in (said := capsys.readouterr().err) and bool(said) is bool(heard)


@pytest.mark.parametrize("sent, code, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_signals_finish_what_is_in_hand_and_have_codes_of_their_own(ended, sent, code, word, monkeypatch):
    finished = []

    def main() -> None:
        try:
            os.kill(os.getpid(), sent)
            for _ in range(10**6):
                pass
        except Exception:
            finished.append("swallowed")
        finally:
            finished.append("finished")
    assert ended(main) == (code, f"error: {word}; {AGAIN}\n") and finished == ["finished"]
    monkeypatch.setenv("RANK", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert ended(main) == (code, "")  # rank 0 has said it


# ---- under torchrun --------------------------------------------------------------------------------------------------

@pytest.fixture
def rank(tmp_path, monkeypatch):
    """(number) -> this process is that rank of one launch; gives the file that torchrun quotes."""
    def become(number: int) -> Path:
        file = tmp_path / f"{number}" / "error.json"
        file.parent.mkdir(exist_ok=True)
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        return file
    monkeypatch.setattr(errors, "HEARING", 0.0)
    return become


def test_of_the_ranks_that_fail_one_tells_and_torchrun_quotes_it(ended, rank):
    first, second = rank(1), rank(0)
    rank(1)
    assert ended(UserError("a.b: is wrong; fix it")) == (2, "error: a.b: is wrong; fix it\n")
    rank(0)
    assert ended(UserError("a.b: is wrong; fix it")) == (2, "")
    assert ended(RuntimeError("Gloo: Connection closed by peer")) == (2, "")
    for number, file in ((1, first), (0, second)):
        failure = ProcessFailure(number, 1, 2, str(file))  # as torchrun reads it
        report = ChildFailedError("stage.py", {number: failure}).format_msg()
        assert report.splitlines()[-2] == "  traceback : error: a.b: is wrong; fix it"


def test_of_ranks_that_are_stopped_one_tells(ended, rank):
    for number, line in ((1, f"error: interrupted; {AGAIN}\n"), (0, "")):
        file = rank(number)
        assert ended(KeyboardInterrupt()) == (130, line) and not file.exists()


def test_a_rank_tells_that_it_lost_another_where_that_one_could_not(ended, rank):
    file = rank(0)
    code, line = ended(RuntimeError("[../gloo/transport/tcp/pair.cc:525] Read error: Connection reset by peer"))
    assert code == 2 and line.startswith("error: rank 0: another rank was killed") and line.endswith(f"; {AGAIN}\n")
    assert not file.exists()  # torchrun says of the other by which signal it ended


def test_a_signal_that_comes_out_as_another_error_is_told_as_the_signal(ended):
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("of what it stopped")
    assert ended(main) == (143, f"error: terminated; {AGAIN}\n")


@pytest.mark.parametrize("sent, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_in_a_destructor_is_not_lost(ended, sent, code, word):
    class Fragile:
        def __del__(self) -> None:
            os.kill(os.getpid(), sent)
            sum(range(10))  # where Python hears of it, and ignores what is raised

    def main() -> None:
        fragile = Fragile()
        del fragile
        time.sleep(20)

    assert ended(main) == (code, f"error: {word}; {AGAIN}\n")


def test_a_signal_after_the_end_changes_nothing():
    run_script(lambda: None)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_waits_until_it_may_come(ended):
    done = []

    def main() -> None:
        with errors.hold_stops():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("held")
        done.append("went on")
    assert ended(main) == (143, f"error: terminated; {AGAIN}\n") and done == ["held"]


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_script(lambda: os.kill(os.getpid(), signal.SIGINT))


def test_a_bug_is_one_line_and_its_traceback_comes_on_demand(ended, monkeypatch):
    def main() -> None:
        assert sys.argv == ["/somewhere/stage.py", "a.b=1"]
        raise ValueError("first line\nsecond line")
    number = main.__code__.co_firstlineno + 2
    line = (f"error: stage.py: ValueError: first line at tests/runtime/test_errors.py:{number}; a bug: run again with "
            "--traceback and report it\n")
    assert ended(main) == (1, line)
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py", "--traceback", "a.b=1"])
    code, printed = ended(main)
    assert code == 1 and printed.startswith("Traceback (most recent call last):") and printed.endswith(line)


def test_a_bug_in_another_package_is_placed_where_the_project_called_it(ended):
    def main() -> None:
        np.zeros(3).reshape(2, 2)
    assert f" at tests/runtime/test_errors.py:{main.__code__.co_firstlineno + 1};" in ended(main)[1]


def test_a_bug_in_a_worker_is_told_without_the_worker_s_traceback(ended):
    message = "Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\nKeyError: 3\n"
    assert ended(ValueError(message))[1].startswith("error: stage.py: ValueError: KeyError: 3 at ")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_names_the_batch_sizes(ended, error):
    code, line = ended(error)
    assert code == 2 and line.count("\n") == 1
    assert line.startswith("error: out of memory (") and "; lower sampling.batch_size" in line


def test_real_requests_for_too_much_memory(ended):
    assert ended(lambda: np.empty(2**60, np.uint8))[0] == 2
    assert ended(lambda: torch.empty(2**60, dtype=torch.uint8))[0] == 2


def terminated_worker() -> RuntimeError:
    error = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 12) is killed by signal: Terminated. ")
    return error


@pytest.mark.parametrize("error, code, words", [
    (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), 2, "set align.processes"),
    (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly with exit code 1. Details"), 2, "set align.processes"),
    (RuntimeError("DataLoader worker (pid 12) is killed by signal: Terminated. "), 143, "terminated; "),
    (terminated_worker(), 143, "terminated; ")])
def test_a_killed_worker_is_told(ended, error, code, words):
    found, line = ended(error)
    assert found == code and words in line and AGAIN in line


def test_a_rank_that_lost_another_points_to_that_one_s_line(ended, monkeypatch):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:5")
    assert ended(error)[0] == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors, "HEARING", 0.0)
    assert ended(error) == (2, "error: rank 1: another rank was killed (out of memory?), or ended on another node, where its own "
                               f"line says why; {AGAIN}\n")


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (Terminated(), 143), (ValueError("x"), None)])
def test_a_signal_during_the_imports_is_one_line_too(monkeypatch, capsys, error, code):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    errors.listen()
    sys.excepthook(type(error), error, None)
    assert codes == ([code] if code else [])
    assert capsys.readouterr().err.startswith("error: " if code else "ValueError")


@pytest.mark.parametrize("sent, code, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_process_that_is_stopped_while_it_imports(sent, code, word):
    script = "from utils.runtime.errors import listen; listen(); print(flush=True); import time; time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=errors.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(sent)
    assert process.communicate(timeout=10) == (b"", f"error: {word}; {AGAIN}\n".encode()) and process.returncode == code


def test_a_reader_that_has_gone_is_told_once(monkeypatch, ended):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    code, line = ended(lambda: print("x" * 100))
    assert code == 2 and "Broken pipe" in line and "who read this output has gone" in line
    assert sys.stdout.close() is None  # nothing is left that fails


def test_names_have_the_place_in_the_project():
    assert (errors.ROOT / "sample.py").is_file() and Path(errors.__file__).is_relative_to(errors.ROOT)
