"""Threads for the CPU versions: one pool of plain Python threads that run functions which release the GIL.

Why not numba's own `parallel=True`: its workqueue layer aborts the process when two Python threads enter it at once (a
data loader's thread beside autograd's); its OpenMP layer aborts a forked child that uses it after its parent did
(DataLoader workers); its TBB layer needs one more package. Plain threads have none of these troubles, compile faster,
take their number from `torch.get_num_threads()` at every call, and leave the order of every sum to the kernel.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_CHUNKS_PER_THREAD = 4  # more chunks than threads, so that a core that others also use does not hold up the rest

_pool: ThreadPoolExecutor | None = None


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


def parallel(function: Callable[[int, int], None], count: int) -> None:
    """Call `function(start, stop)` on pieces of range(count), on `torch.get_num_threads()` threads, caller included.

    `function` must release the GIL to gain anything, and its pieces must write to disjoint memory.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        if count:
            function(0, count)
        return
    pieces = min(count, threads * _CHUNKS_PER_THREAD)
    bounds = [count * i // pieces for i in range(pieces + 1)]
    chunks = itertools.pairwise(bounds)  # shared: each thread takes the next one when it is free

    futures = [pool().submit(_work, function, chunks) for _ in range(threads - 1)]
    try:
        _work(function, chunks)
    finally:
        for future in futures:
            future.result()


def _work(function: Callable[[int, int], None], chunks: Iterator[tuple[int, int]]) -> None:
    for start, stop in chunks:
        function(start, stop)
