import os
import signal
import threading

import pytest

from distrain.launch.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_insists(number):
    before, asked = signal.getsignal(number), threading.Event()
    with stop_on_signals(asked.set) as received:
        os.kill(os.getpid(), number)
        assert asked.wait(5)
        assert received == [number]
        assert signal.getsignal(number) == before, "the next one ends the process"
    assert signal.getsignal(number) == before
