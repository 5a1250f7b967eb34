"""Ctrl-C, and the SIGTERM of a scheduler, as a flag, for long operations that stop at a good place."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first signal into a flag, so that what is running completes; a second one interrupts at once."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    # What is ignored stays so; a handler that is not Python's could not be brought back.
    heard = [number for number in signals if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: pressed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
