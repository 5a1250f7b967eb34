"""Atomic file writes, and checks, before long work starts, that its results can be written."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from talos_fast.errors import TalosError


def require_folder(path: Path | None, option: str) -> None:
    """Refuses a folder that could not be made or written, before the work whose results go there; makes nothing.

    Raises:
        TalosError: names the option and what stands in the way.
    """
    if path is None:
        return
    place = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))
    if not place.is_dir():
        raise TalosError(f"{option} {path}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TalosError(f"{option} {path}: {place} cannot be written; choose another place")


def require_file(path: Path | None, option: str) -> None:
    """Refuses a file that `atomic` could not write, before the work whose results go there; makes nothing.

    Raises:
        TalosError: names the option and what stands in the way.
    """
    if path is None:
        return
    if os.path.exists(path) and not path.is_file():
        raise TalosError(f"{option} {path}: a {'folder' if path.is_dir() else 'device'}; give the name of a file")
    require_folder(path.parent, option)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; what is written there replaces ``path`` only if nothing failed.

    Raises:
        TalosError: the folder cannot be written or the disk is full; the old file, if any, is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; give them the permissions that open() would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space or choose another place" if full else "choose another place"
        raise TalosError(f"{path}: cannot be written ({error}); {advice}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, atomically."""
    write_text(path, json_for(path, content, indent=2) + "\n")


def dumps(content: Any, indent: int | None = None) -> str:
    """Canonical JSON, with NumPy's numbers as plain ones."""

    def plain(value: object) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a {type(value).__name__}")

    return json.dumps(content, indent=indent, sort_keys=True, default=plain)


def json_for(path: Path, content: Any, indent: int | None = None) -> str:
    """Canonical JSON that is to be written to ``path``.

    Raises:
        TalosError: the content is no JSON.
    """
    try:
        return dumps(content, indent)
    except TypeError as error:
        raise TalosError(f"{path}: what is to be written is no JSON ({error}); give plain numbers and texts") from error
