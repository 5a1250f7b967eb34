"""Ctrl-C, and the SIGTERM of a scheduler: a flag for long operations that stop at a good place, or made to wait."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU")
WAITING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
"""Signals whose handlers may raise: what ends a program, schedulers' warnings, timers."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first signal into a flag, so that what is running completes; a second one interrupts at once.

    One that came too late to stop anything interrupts at the end. SIGTERM is left to a program that handles it itself.

    Raises:
        KeyboardInterrupt: there was a signal, and nothing else was raised.
    """
    pressed, owner = False, os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if os.getpid() != owner:  # a process that was forked meanwhile
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)
        elif pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    # What is ignored stays so, and a handler that is not Python's could not be brought back.
    heard = [signal.SIGINT] if signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN) else []
    heard += [signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else []
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: pressed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets signals wait until the block ends: for what must not be left half done, and is soon done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers: list[tuple[int, Any]] = []
    try:
        for number in WAITING:
            handler = signal.getsignal(number)
            if callable(handler) or (handler is signal.SIG_DFL and number == signal.SIGTERM):
                handlers.append((number, handler))
                signal.signal(number, lambda came, _: waiting.append(came))
        yield
    finally:  # not an ExitStack: that cuts what a delivered one raises off from what was being handled
        _hand_back(handlers, waiting)


def _hand_back(handlers: list[tuple[int, Any]], waiting: list[int]) -> None:
    """Goes on, last in first out, where a signal that is delivered raises."""
    if handlers:
        try:
            signal.signal(*handlers.pop())
        finally:
            _hand_back(handlers, waiting)
    elif waiting:
        try:
            signal.raise_signal(waiting.pop(0))
        finally:
            _hand_back(handlers, waiting)
