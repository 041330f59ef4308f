"""Ctrl-C and SIGTERM take effect after the current step is finished and saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_waiting: list[int] = []  # signals received while they were deferred


class Stopped(KeyboardInterrupt):
    """A deferred signal takes effect: `signal` is its number, the message says what was saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Defer SIGINT and SIGTERM within a block -> the list of the signals received; the caller raises `Stopped`.

    A second Ctrl-C interrupts at once. Nested blocks share the list. Signals left in it take effect at the end of the
    outermost block. Outside the main thread, where Python delivers no signals, the list stays empty.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    before = {number: signal.signal(number, _defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield _waiting
    except BaseException:
        _waiting.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if _waiting and before[signal.SIGINT] is not _defer:
        number = _waiting[0]
        _waiting.clear()
        signal.raise_signal(number)


def _defer(number, frame):
    if number == signal.SIGINT and number in _waiting:
        raise KeyboardInterrupt
    _waiting.append(number)
