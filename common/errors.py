"""The one exception that means: the user can mend this."""

from __future__ import annotations

import sys
from collections.abc import Callable

MOST_CHARACTERS = 2000


class UserError(Exception):
    """Bad input. The message is one line: what was expected, what was found, what to do.

    What is quoted from a file may hold anything: control characters are escaped, and long quotations shortened.
    """

    def __str__(self) -> str:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
        return (
            text
            if len(text) <= MOST_CHARACTERS
            else f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"
        )


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
