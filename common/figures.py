"""Pictures that are written for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure in the format of its file's name. UserError for no such, or no such place."""
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        known = ", ".join(sorted({"png", "pdf", "svg", "jpg"} & formats.keys()))
        raise UserError(f"expected a picture's name to end in one of {known}, found {path}")
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise UserError(f"expected to write a picture to {path}: {error.strerror or error}") from None
