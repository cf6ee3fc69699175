"""numba with this project's settings: without the GIL, compiled once per machine, only the liberties that are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba.core.caching import FunctionCache

log = logging.getLogger("detrcache")


def jit(*liberties: str) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`, with LLVM's fast-math flags `liberties` ("contract": products and sums fused; "reassoc": sums
    reordered, which vectorises them; the code that comes out still adds in one fixed order).

    The machine code is kept beside the source, or in the user's cache directory where that cannot be written
    (NUMBA_CACHE_DIR names another place). Where nothing can be written, each process compiles again, and says so once.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=set(liberties))(function)
        try:
            compiled._cache = _KeptCode(function)  # as its enable_caching does
        except RuntimeError:
            _say_that_nothing_is_kept()
        return compiled

    return decorate


_FunctionCache: Any = FunctionCache  # untyped


class _KeptCode(_FunctionCache):  # type: ignore[misc]
    """numba's files of compiled code, which a full disk or a damaged file must not turn into an error.

    RuntimeError where no folder can be written.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling half a file raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:
            _say_that_nothing_is_kept()


@cache
def _say_that_nothing_is_kept() -> None:
    """Once, not for every function."""
    log.warning(
        "compiled code cannot be kept: every process compiles again, for up to a minute; name a folder that can be"
        " written, and has space, with NUMBA_CACHE_DIR"
    )


def inlined(*liberties: str, counting: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """A part of a `jit` function, compiled into it, so that the caller's constants are constants in it too.

    numba counts references to the arrays it is given, unless it sees that it need not; in a part with branches it does
    not see that, and counting can take as long as the rest. Without `counting` the part must not make arrays.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"forceinline": True, "_nrt": counting}
        return numba.njit(error_model="numpy", fastmath=set(liberties), **options)(function)

    return decorate
