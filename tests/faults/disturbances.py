"""What is done to a stage in the middle of its work, as what its process calls first (`prepare`) or is sent."""
import ctypes
import errno
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from utils.runtime.errors import ROOT

MESSAGES = (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                                        "memory: you tried to allocate 4194304 bytes. Error code 12 (Cannot allocate memory)"))


def at_rename(number: int, after: bool) -> Callable[[], None]:
    """Kills the process at its n-th rename, before or after it."""
    def prepare() -> None:
        replace, calls = os.replace, []

        def killing(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args, **kwargs)
            if len(calls) == number and after:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = killing
    return prepare


def full_disk(number: int) -> Callable[[], None]:
    """From the n-th flush to the disk on there is no space."""
    def prepare() -> None:
        fsync, calls = os.fsync, []

        def full(descriptor):
            calls.append(1)
            if len(calls) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)
        os.fsync = full
    return prepare


def small_files(size: int) -> Callable[[], None]:
    """No file may be longer than that."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only() -> None:
    """Nothing may be written into the folders of `out`, not even by root."""
    allow(Path("out"), 0o555)
    libc, version, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(version, sets)
    sets[0] &= ~0b110  # the effective CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(version, sets)


def allow(folder: Path, mode: int) -> None:
    for where, _, _ in os.walk(folder):
        os.chmod(where, mode)


def little_memory(more: int) -> Callable[[], None]:
    """The process may take only `more` bytes more than it has."""
    def prepare() -> None:
        with open("/proc/self/statm") as pages:
            limit = int(pages.read().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return prepare


def out_of_memory(moment: float, calls: int, error: BaseException) -> Callable[[], None]:
    """At that part (0 .. 1) of a stage's calls of the project's functions, an allocation fails."""
    return lambda: profile(max(1, int(moment * calls)), error)


def profile(last: int = 0, error: BaseException | None = None) -> list[int]:
    """Count the calls of the project's functions from here on; raise the error at the last one."""
    calls = [0]

    def hook(frame, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(f"{ROOT}/") and not name.startswith(f"{ROOT}/tests/"):
            calls[0] += 1
            if calls[0] == last:
                sys.setprofile(None)
                raise error
    threading.setprofile(hook)
    sys.setprofile(hook)
    return calls
