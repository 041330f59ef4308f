import os
import signal
import threading

import pytest

from refined_ldm.durable.signals import defer_signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_and_the_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with defer_signals() as signals:
        send(number)
        assert signals == [number]
        with defer_signals() as inner:
            assert inner == [number]  # one list for all blocks
            inner.clear()  # taken
        assert signals == []
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_pending_signal_takes_effect_at_the_end_of_the_outermost_block():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with defer_signals():
            with defer_signals():
                send(signal.SIGINT)
            reached.append("still held back")
        reached.append("too far")
    assert reached == ["still held back"]
    with defer_signals() as signals:
        assert signals == []


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), defer_signals():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it waited")
    with defer_signals() as signals:
        assert signals == []


def test_a_fault_inside_forgets_the_signal():
    with pytest.raises(ValueError), defer_signals():
        send(signal.SIGTERM)
        raise ValueError
    with defer_signals() as signals:
        assert signals == []


def test_in_another_thread_nothing_happens():
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        with defer_signals() as signals:
            found.append((signals, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [([], before)]
