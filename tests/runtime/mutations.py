"""Files with random damage: what hypothesis hands to the tests of every reader."""
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.runtime.errors import UserError

EXAMPLES = settings(max_examples=100, derandomize=True, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SECONDS, BYTES = 1, 200 * 2**20
NUMBERS = [b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"9" * 12, b"-1", b"nan", b"${a}", b"("]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file with up to four flips, cuts, insertions, repetitions or numbers that lie."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "remove", "insert", "repeat", "lie"])):
            case "flip" if place < len(data):
                data[place] ^= draw(st.integers(1, 255))
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + draw(st.integers(1, 40))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=20))
            case "repeat":
                data[place:place] = data[place : place + 40] * draw(st.integers(1, 5))
            case "lie":
                lie = draw(st.sampled_from(NUMBERS))
                data[place : place + len(lie)] = lie
    return bytes(data)


def read_or_refused(read: Callable[[], object]) -> None:
    """The file is read, or refused in one line, at once and without much memory."""
    tracemalloc.start()
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and ": " in message and "; " in message and len(message) < 1500, message
    taken = time.process_time() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # what torch takes is not traced
    peak = max(tracemalloc.get_traced_memory()[1], grown)
    tracemalloc.stop()
    assert taken < SECONDS and peak < BYTES, (taken, peak)


def check_reader(file: Path, whole: bytes, read: Callable[[], object]) -> None:
    """The whole file is read; with any damage it is read or refused."""
    file.write_bytes(whole)
    read()

    @EXAMPLES
    @given(damaged(whole))
    def mutated(data: bytes) -> None:
        file.write_bytes(data)
        read_or_refused(read)

    mutated()
