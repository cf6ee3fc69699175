"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP): the step under way is finished and saved before the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def signals_to_heed() -> list[signal.Signals]:
    """Those that mean: stop. Under nohup, SIGHUP does not."""
    return [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]


class Interrupted(Exception):
    """The run was told to stop, and has saved its state. exit_status: 128 and the signal's number, as shells have it:
    130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class StopRequest:
    """Whether this process was told to stop. A second signal ends it at once, as does one during `at_once`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Note signals inside this block, instead of dying of them. (Only the main thread can: others do without.)"""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in signals_to_heed()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise KeyboardInterrupt where a signal comes inside this block: nothing in it is worth finishing."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _: FrameType | None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number)
        if again or self._at_once:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        return 128 + (self.signal or signal.SIGINT)
