"""Threads for the CPU versions: plain Python threads that run compiled functions without the GIL.

Why not numba's own `parallel=True`: its workqueue layer aborts the process when two Python threads enter it at once (a
data loader's thread beside autograd's); its OpenMP layer aborts a forked child that uses it after its parent did
(DataLoader workers); its TBB layer needs one more package. Plain threads have none of these troubles, compile faster,
take their number from `torch.get_num_threads()` at every call, and leave the order of every sum to the kernel.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from kernels.jit import inlined, jit

_TAKEN, _DONE, _ALL, _FAILED = 0, 1, 2, 3  # units, counted; threads that met an error

_Tell = Callable[[Exception], object]
_Job = tuple[Callable[..., object], tuple[Any, ...], "_Tell | None"]

_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


class Helpers:
    """Threads that help with work of a millisecond, in which an executor's futures and locks would be felt: each of
    their steps needs the GIL, for which whoever gave the work waits. They end with this object, or when `stop` is
    called. A forked process starts its own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._process, self._count, self._jobs = os.getpid(), 0, SimpleQueue[_Job | None]()
        self.stop = weakref.finalize(self, self._jobs.put, None)

    def start(self, count: int, function: Callable[..., object], *arguments: Any, tell: _Tell | None = None) -> None:
        """Have `count` threads call the function, when each has the time. Its errors go to `tell`; without one, the
        caller does the same work, until none is left, and meets them himself."""
        if self._process != os.getpid():
            self._begin()
        for _ in range(self._count, count):
            Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True).start()
        self._count = max(self._count, count)
        for _ in range(count):
            self._jobs.put((function, arguments, tell))


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        function, arguments, tell = job
        try:
            function(*arguments)
        except Exception as error:
            if tell is not None:
                tell(error)
        del job, function, arguments, tell  # memory that others may wait for, before the next job comes
    jobs.put(None)  # for the other threads


HELPERS = Helpers("kernels")


def parallel(kernel: Callable[..., None], units: int, *arguments: Any, last: int = 0) -> None:
    """Do `units` units of work on `torch.get_num_threads()` threads, caller included.

    Each thread calls `kernel(progress, *arguments)`, compiled by `jit`, which does one unit after another until `take`
    gives none. Units must write to disjoint memory. Nobody waits for a thread that comes too late to find one: it may
    take milliseconds to wake up, or to get the GIL for its call. The caller does the `last` units alone: where these
    take some microseconds, the other threads have given back the GIL when he needs it.

    Raises what the kernel raised, on whichever thread; what is to be written is then incomplete.
    """
    threads = min(torch.get_num_threads(), units)
    counters, errors = np.array([0, 0, units, 0]), list[Exception]()

    def tell(error: Exception) -> None:  # the unit that the thread had taken will never be done
        errors.append(error)
        counters[_FAILED] = 1

    HELPERS.start(threads - 1, kernel, (counters, units - last), *arguments, tell=tell)
    kernel((counters, units), *arguments)
    if threads > 1:
        _wait(counters)
    if errors:
        raise errors[0]


def _add(context: Any, counters: Any, index: Any, amount: Any) -> Any:
    """counters[index] += amount, in one step among all threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", builder.gep(array.data, [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), generate


add: Any = intrinsic(_add)


@inlined()
def take(progress):  # type: ignore[no-untyped-def]
    """The next unit that nobody has taken, for this thread to do; -1 if there is none."""
    counters, stop = progress
    may = counters[_TAKEN] < stop
    unit = add(counters, _TAKEN, may)  # a branch around it would cost a kernel a third of its speed
    return unit if may & (unit < counters[_ALL]) else -1


@inlined()
def finish(progress):  # type: ignore[no-untyped-def]
    """To be called after each unit, when all is written."""
    add(progress[0], _DONE, 1)


@jit()
def _wait(counters):  # type: ignore[no-untyped-def]
    while counters[_DONE] < counters[_ALL] and not counters[_FAILED]:  # the others are at their last units
        _sched_yield()
