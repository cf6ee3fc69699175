"""numba with this project's settings: no GIL, products and sums fused, compiled once per machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., None]) -> Any:
    """`numba.njit` whose machine code is kept: beside the source, or in the user's cache directory where that cannot be
    written (NUMBA_CACHE_DIR names another place). Where nothing can be written, each process compiles anew.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", fastmath={"contract"}, cache=True)(function)
    except RuntimeError:  # numba found no directory to write to
        return numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)


def inlined(function: Callable[..., None]) -> Any:
    """A part of a `jit` function, compiled into it, so that the caller's constants are constants in it too."""
    return numba.njit(error_model="numpy", fastmath={"contract"}, forceinline=True)(function)
