"""Threads for the CPU versions: one pool of plain Python threads that run compiled functions without the GIL.

Why not numba's own `parallel=True`: its workqueue layer aborts the process when two Python threads enter it at once (a
data loader's thread beside autograd's); its OpenMP layer aborts a forked child that uses it after its parent did
(DataLoader workers); its TBB layer needs one more package. Plain threads have none of these troubles, compile faster,
take their number from `torch.get_num_threads()` at every call, and leave the order of every sum to the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from kernels.jit import inlined, jit

_TAKEN, _DONE, _ALL = 0, 1, 2  # units, counted in `progress`

_pool: ThreadPoolExecutor | None = None
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


def pool() -> ThreadPoolExecutor:
    """The process's pool; a forked child starts its own, for threads do not survive a fork."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(8, os.cpu_count() or 1), thread_name_prefix="kernels")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def parallel(kernel: Callable[..., None], units: int, *arguments: Any) -> None:
    """Do `units` units of work on `torch.get_num_threads()` threads, caller included.

    Each thread calls `kernel(progress, *arguments)`, compiled by `jit`, which does one unit after another until `take`
    gives none. Units must write to disjoint memory. Nobody waits for a thread that comes too late to find one: it may
    take milliseconds to wake up, or to get the GIL for its call.
    """
    threads = min(torch.get_num_threads(), units)
    progress = np.array([0, 0, units])
    for _ in range(threads - 1):
        pool().submit(kernel, progress, *arguments)
    kernel(progress, *arguments)
    if threads > 1:
        _wait(progress)


def _add_one(context: Any, counters: Any, index: Any) -> Any:
    """counters[index] += 1, in one step among all threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", place, context.get_constant(types.int64, 1), "seq_cst")

    return types.int64(counters, types.int64), generate


add_one: Any = intrinsic(_add_one)


@inlined()
def take(progress):  # type: ignore[no-untyped-def]
    """The next unit that nobody has taken, for this thread to do; -1 if there is none."""
    unit = add_one(progress, _TAKEN)
    return unit if unit < progress[_ALL] else -1


@inlined()
def finish(progress):  # type: ignore[no-untyped-def]
    """To be called after each unit, when all is written."""
    add_one(progress, _DONE)


@jit()
def _wait(progress):  # type: ignore[no-untyped-def]
    while progress[_DONE] < progress[_ALL]:  # the others are at their last units
        _sched_yield()
