"""Work beside the main thread: what is needed next is prepared ahead, what is done is put away behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Like `map`, with up to `ahead` results (at least one) prepared in the pool's threads; order is kept.

    An error of `function` is raised where its result would have come.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


class WriteBehind:
    """Runs calls one after another in a thread of its own, while at most `waiting` of them queue up.

    Calling it blocks where the queue is full: memory stays bounded when the disk is slower. An error of an earlier
    call is raised by a later one, or on leaving the block.
    """

    def __init__(self, waiting: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._pending: deque[Future[Any]] = deque()
        self._waiting = waiting

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        while len(self._pending) > self._waiting:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(function, *args))

    def wait(self) -> None:
        """Return when nothing is under way any more, whatever became of it."""
        for future in self._pending:
            future.exception()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        while self._pending and error is None:  # else calls that failed in the wake of `error` would hide it
            self._pending.popleft().result()
