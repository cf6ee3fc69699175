"""Ranges of the numbers that a user can choose: an option is `Annotated[int, AtLeast(1)]`, and says so in one line."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from common.errors import UserError

MAX_SIDE_PX = 8192  # of a sample, and of a teacher's input
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class AtLeast:
    """Of an option's numbers, a single one or several."""

    least: float


@dataclass(frozen=True)
class AtMost:
    """Of an option's numbers, a single one or several."""

    most: float


def check_ranges(config: Any) -> None:
    """UserError for the first option of a dataclass, or of one within it, that is out of its range; NaN always is."""
    hints = get_type_hints(type(config), include_extras=True)
    for option in fields(config):
        value, flag = getattr(config, option.name), "--" + option.name.replace("_", "-")
        if is_dataclass(value):
            check_ranges(value)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            for limit in getattr(hints[option.name], "__metadata__", ()):
                if isinstance(limit, AtLeast) and not number >= limit.least:
                    raise UserError(f"expected {flag} of {limit.least:g} or more, found {number}")
                if isinstance(limit, AtMost) and not number <= limit.most:
                    raise UserError(f"expected {flag} of at most {limit.most:g}, found {number}")
