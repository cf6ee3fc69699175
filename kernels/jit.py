"""numba with this project's settings: without the GIL, compiled once per machine, only the liberties that are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(*liberties: str) -> Callable[[Callable[..., None]], Any]:
    """`numba.njit`, with LLVM's fast-math flags `liberties` ("contract": products and sums fused; "reassoc": sums
    reordered, which vectorises them; the code that comes out still adds in one fixed order).

    The machine code is kept beside the source, or in the user's cache directory where that cannot be written
    (NUMBA_CACHE_DIR names another place). Where nothing can be written, each process compiles anew.
    """

    def decorate(function: Callable[..., None]) -> Any:
        try:
            return numba.njit(nogil=True, error_model="numpy", fastmath=set(liberties), cache=True)(function)
        except RuntimeError:  # numba found no directory to write to
            return numba.njit(nogil=True, error_model="numpy", fastmath=set(liberties))(function)

    return decorate


def inlined(*liberties: str, counting: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """A part of a `jit` function, compiled into it, so that the caller's constants are constants in it too.

    numba counts references to the arrays it is given, unless it sees that it need not; in a part with branches it does
    not see that, and counting can take as long as the rest. Without `counting` the part must not make arrays.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"forceinline": True, "_nrt": counting}
        return numba.njit(error_model="numpy", fastmath=set(liberties), **options)(function)

    return decorate
