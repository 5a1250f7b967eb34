"""Files that one of several processes makes, while the others wait for it or do something else."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from talos_fast.errors import TalosError

POLL_SECONDS = 0.2

logger = logging.getLogger("talos_fast")


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Holds the making of a file, after waiting for a process that holds it; one that dies lets go.

    Raises:
        TalosError: the folder cannot be written.
    """
    lock = _lock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting for the process that makes it", path)
            lock.acquire(poll_interval=POLL_SECONDS)
    except OSError as error:
        raise TalosError(f"{path}: cannot be locked ({error}); choose another place") from error
    try:
        yield
    finally:
        lock.release()
    _remove(lock)


def is_being_made(path: Path) -> bool:
    """Whether a process holds the making of a file."""
    lock = _lock(path)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            pass
    except Timeout:
        return True
    except OSError:  # `making` says what is wrong
        return False
    if path.exists():  # since just now, and asking has put back the lock file that its maker took away
        _remove(lock)
    return False


def _remove(lock: BaseFileLock) -> None:
    """Once the file is there it does not matter who still holds which lock."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)


def _lock(path: Path) -> BaseFileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))
