"""Numbers and columns as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def size(n_bytes: float) -> str:
    """Bytes with three significant digits and a decimal unit: 6.21 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}" if unit != "bytes" else f"{n_bytes:.0f} bytes"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with three significant digits."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:.3g} hours"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def facts(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a name and what is to be said of it."""
    width = max(len(name) for name, _ in pairs)
    return [f"{name.ljust(width)}  {text}" for name, text in pairs]
