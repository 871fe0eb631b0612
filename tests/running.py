"""A script's main in the test's own process, as its command line would run it."""
import sys


def run(script, *arguments: str) -> None:
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *arguments]
    try:
        script.main()
    finally:
        sys.argv = before
