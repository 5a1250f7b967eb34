"""`ProcessWide`: settings of the whole process that several threads may want changed at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class ProcessWide:
    """Enters a context with the first thread and leaves it with the last: each alone would put back the other's change.

    Args:
        change: makes the context.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock, self._threads, self._stack = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it the settings are changed."""
        with self._lock:
            if self._threads == 0:
                self._stack.enter_context(self._change())
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0:
                    self._stack.close()
