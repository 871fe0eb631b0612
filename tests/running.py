"""A script's main in the test's own process, as its command line would run it, and processes that are killed."""
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@contextmanager
def killed_at(number: int, owner: object, name: str) -> Iterator[None]:
    """What the block does is killed where it calls `owner.name` for the number-th time."""
    original, calls = getattr(owner, name), []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return original(*arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies)
        yield


def run(script, *arguments: str) -> None:
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *arguments]
    try:
        script.main()
    finally:
        sys.argv = before
