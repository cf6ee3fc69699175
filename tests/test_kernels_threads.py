"""What the CPU kernels share: threads that take units of work, and memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cached_feature_loss, memory
from kernels.jit import jit
from kernels.threads import finish, parallel, pool, take


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    memory._free.clear()
    yield
    torch.set_num_threads(before)


@jit()
def _count(progress: Any, done: Any) -> None:
    while True:
        unit = take(progress)
        if unit < 0:
            break
        done[unit] += 1
        finish(progress)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("units", [0, 1, 5, 1000])
def test_every_unit_is_done_once(threads: int, units: int) -> None:
    """Each of the units is counted once when `parallel` returns."""
    torch.set_num_threads(threads)
    for _ in range(20):
        done = np.zeros(units, np.int64)
        parallel(_count, units, done)
        assert (done == 1).all()


def test_nobody_waits_for_threads_that_come_too_late() -> None:
    """With every thread of the pool held up, the caller does all units and returns; the late threads find none."""
    torch.set_num_threads(2)
    go_on = threading.Event()
    held_up = [pool().submit(go_on.wait, 60) for _ in range(pool()._max_workers)]
    done = np.zeros(100, np.int64)
    try:
        parallel(_count, 100, done)
        assert not any(future.done() for future in held_up)
    finally:
        go_on.set()
    assert (done == 1).all()


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    """`empty` gives new memory while a view of the old is held, then the old; each begins with a cache line."""
    shape = torch.Size((3, 1000, 500))
    first = memory.empty(shape, torch.float32)
    place, view = first.data_ptr(), first[1:].numpy()
    del first
    second = memory.empty(shape, torch.bfloat16)
    assert second.shape == shape
    assert second.dtype == torch.bfloat16
    assert not place <= second.data_ptr() < place + 6_000_000
    assert second.data_ptr() % memory.LINE_BYTES == place % memory.LINE_BYTES == 0
    del view
    third = memory.empty(torch.Size((1000, 500)), torch.float64)
    assert third.data_ptr() == place


def test_only_the_largest_memory_is_kept() -> None:
    """Of two that are let go of, the larger serves a request for its size, in either order."""
    for sizes in ((2_000_000, 3_000_000), (3_000_000, 2_000_000)):
        memory._free.clear()
        lent = [memory.empty(torch.Size((size,)), torch.float32) for size in sizes]
        place = max(lent, key=len).data_ptr()
        while lent:
            lent.pop(0)
        assert memory.empty(torch.Size((3_000_000,)), torch.float32).data_ptr() == place
        assert len(memory._free) <= 1


def test_gradients_of_two_steps_do_not_share_memory() -> None:
    """A gradient that is held keeps its values while the next one is computed."""
    student = torch.ones(2, 2000, 128, requires_grad=True)
    positions, offsets = torch.arange(2000).repeat(2), torch.tensor([0, 2000, 4000])
    arguments = (positions, torch.ones(4000), offsets)
    held = torch.autograd.grad(cached_feature_loss(student, torch.zeros(4000, 128), *arguments), student)[0]
    torch.autograd.grad(cached_feature_loss(student, torch.full((4000, 128), 7.0), *arguments), student)
    assert (held == 2).all()
