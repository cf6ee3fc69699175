"""What the CPU kernels share: threads that take units of work, and memory that is used again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numba.core.errors import TypingError
from scipy.optimize import linear_sum_assignment

from kernels import cached_feature_loss, hungarian_start, memory
from kernels.jit import jit
from kernels.threads import HELPERS, Helpers, finish, parallel, take


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
@pytest.mark.parametrize("last", [0, 3])
@pytest.mark.parametrize("units", [0, 1, 5, 1000])
def test_every_unit_is_done_once(threads: int, units: int, last: int) -> None:
    """Each of the units is counted once when `parallel` returns, whether or not the caller does the last ones alone."""
    torch.set_num_threads(threads)
    for _ in range(20):
        done = np.zeros(units, np.int64)
        parallel(_count, units, done, last=last)
        assert (done == 1).all()


@pytest.fixture
def let_go() -> Iterator[list[bool]]:
    """Every helping thread is held up until the test ends, or for 20 seconds: then the list is no longer empty."""
    torch.set_num_threads(2)
    busy, go_on, let_go = threading.Semaphore(0), threading.Event(), list[bool]()

    def hold_up() -> None:
        busy.release()
        let_go.append(go_on.wait(20))

    count = max(1, HELPERS._count)
    HELPERS.start(count, hold_up)
    for _ in range(count):
        assert busy.acquire(timeout=60)
    yield let_go
    go_on.set()


def test_nobody_waits_for_threads_that_come_too_late(let_go: list[bool]) -> None:
    """With all helping threads held up, the caller does every unit and returns; the late ones find none."""
    done = np.zeros(100, np.int64)
    parallel(_count, 100, done)
    assert not let_go
    assert (done == 1).all()


def test_matching_does_not_wait_for_them_either(let_go: list[bool]) -> None:
    """Assignments of 12 matrices: scipy's."""
    costs = torch.rand(12, 9, 5)
    result = hungarian_start(costs).result()
    assert not let_go
    for cost, found in zip(costs, result, strict=True):
        rows, columns = linear_sum_assignment(cost.numpy())
        assert found[columns].tolist() == rows.tolist()


def test_a_helping_threads_error_is_the_callers_to_meet() -> None:
    """A thread whose function raises takes the next job all the same; `parallel` raises what the caller meets."""
    helpers, done = Helpers("test"), threading.Event()
    helpers.start(1, int, "no number")
    helpers.start(1, done.set)
    assert done.wait(60)
    torch.set_num_threads(2)
    with pytest.raises(TypingError):
        parallel(_count, 2, "no array")
    units = np.zeros(100, np.int64)
    parallel(_count, 100, units)
    assert (units == 1).all()


def test_a_thread_that_fails_with_a_unit_in_hand_is_not_waited_for() -> None:
    """A helping thread takes a unit and raises: `parallel` raises its error when the others are done, within a minute,
    instead of waiting for that unit without end."""
    torch.set_num_threads(2)
    caller, taken, met = threading.current_thread, threading.Event(), list[BaseException]()

    def kernel(progress: Any, done: Any) -> None:
        if caller().name != "caller":
            take(progress)
            taken.set()
            raise MemoryError("no memory for a sum")
        assert taken.wait(20)
        _count(progress, done)

    def call() -> None:
        try:
            parallel(kernel, 5, np.zeros(5, np.int64))
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=call, name="caller", daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in met] == ["no memory for a sum"]


@pytest.mark.parametrize("stopped", [True, False])
def test_helping_threads_end_and_hold_nothing(stopped: bool) -> None:
    """They let go of their arguments after the work, and are gone when stopped or when nobody holds the helpers."""
    before = set(threading.enumerate())
    helpers, argument, done = Helpers("test"), np.zeros(3), threading.Semaphore(0)
    gone = weakref.ref(argument)
    helpers.start(3, lambda _: done.release(), argument)
    del argument
    for _ in range(3):
        assert done.acquire(timeout=60)
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started] == ["test"] * 3
    if stopped:
        helpers.stop()
    del helpers
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()
    assert gone() is None


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
