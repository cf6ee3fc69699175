"""The one exception that means: the user can mend this."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what was expected, what was found, what to do."""


def run_command(command: Callable[[], None]) -> None:
    """Call `command`; print a `UserError` as one line on stderr and exit with status 2, without a traceback."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
