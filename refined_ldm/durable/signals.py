"""Ctrl-C and SIGTERM wait until the step under way is finished and saved."""

import signal
import threading
from contextlib import contextmanager

_waiting = []  # signals that came while they were held back


class Stopped(KeyboardInterrupt):
    """A signal that was held back takes effect: `signal` is its number, the text says what was saved."""

    def __init__(self, number, told):
        super().__init__(told)
        self.signal = number


@contextmanager
def defer_signals():
    """Yield the list of signals (SIGINT, SIGTERM) that have come: whoever holds them back empties it, and raises
    `Stopped` when it suits.

    A second Ctrl-C does not wait. Blocks within each other share the list, and what nobody took takes effect at the end
    of the outermost one. Outside the main thread, where Python delivers no signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    before = {number: signal.signal(number, _hold_back) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield _waiting
    except BaseException:
        _waiting.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if _waiting and before[signal.SIGINT] is not _hold_back:
        number = _waiting[0]
        _waiting.clear()
        signal.raise_signal(number)


def _hold_back(number, frame):
    if number == signal.SIGINT and number in _waiting:
        raise KeyboardInterrupt
    _waiting.append(number)
