"""How every script fails: one line that names the file or setting, what is wrong and the fix; exit code 2."""
import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can fix. Its message is one line: `<file or setting>: <what is wrong>; <the fix>`."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`: a UserError or a full disk ends in one line on stderr and exit code 2.

    Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        message = (f"{error.filename or 'output'}: {error.strerror}; free space or choose another paths.output, "
                   "then run the same command again: it continues")
    except KeyboardInterrupt:
        message = "interrupted; run the same command again: it continues"
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
