"""`Cells`: what a study has finished, by name, so that one that was killed goes on, and several share the work."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from talos_fast import vector_file, writing
from talos_fast.errors import TalosError
from talos_fast.locking import is_being_made, making
from talos_fast.mask import Mask
from talos_fast.task_vector import TaskVector

T = TypeVar("T")

CHECKPOINT = "checkpoint"


class Cells:
    """Finished parts of a computation, each made once: kept in a folder, or in memory.

    Every file is written atomically, so a part is there as a whole or not at all. Of several processes that work in one
    folder, one makes a part, and whoever needs it waits for it.

    Args:
        folder: made if it is not there; None keeps everything in memory.
        identity: what is computed (JSON); kept in the folder.
        checkpoints: whether a part that takes long may keep its own state in the folder until it is finished.

    Raises:
        TalosError: the folder holds parts of another computation, or cannot be written.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None, checkpoints: bool = False
    ) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._memory: dict[str, Any] = {}
        if folder is None:
            return
        mine = json.loads(writing.dumps(identity))
        theirs = self.value("plan", lambda: mine)
        if theirs != mine:
            differing = ", ".join(_differences("", theirs, mine))
            raise TalosError(
                f"{folder}: holds results of another plan ({differing}); give another folder, or remove it"
            )

    def value(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value, made once."""
        return self._get(make, _value_file(name), writing.write_json, _read_json)

    def values(
        self, parts: Mapping[str, Callable[[], Any]], bar: Callable[[Iterator[str]], Iterable[str]]
    ) -> dict[str, Any]:
        """The `value` of each part, by name; made last are those that another process is making.

        Args:
            parts: name -> make.
            bar: gives the names on, and shows how far it is.
        """
        made = {name: self.value(name, parts[name]) for name in bar(self._in_turn(parts))}
        return {name: made[name] for name in parts}

    def whole(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON value that is put together of parts: every process does that, and they share the parts' making."""
        return self._get(make, _value_file(name), writing.write_json, _read_json, shared=True)

    def mask(self, name: str, make: Callable[[], Mask]) -> Mask:
        """A mask, made once."""
        return self._get(make, f"{name}.safetensors", lambda path, mask: mask.save(path), Mask.load)

    def vector(self, name: str, make: Callable[[], TaskVector]) -> TaskVector:
        """A task vector, made once, in a folder of its own."""

        def save(path: Path, vector: TaskVector) -> None:
            vector.save_pretrained(path.parent)
            shutil.rmtree(path.parent / CHECKPOINT, ignore_errors=True)

        def load(path: Path) -> TaskVector:
            return TaskVector.from_pretrained(path.parent)

        return self._get(make, _vector_file(name), save, load)

    def checkpoint(self, name: str) -> Path | None:
        """Where the making of a vector keeps its state; gone once the vector is there. None: nowhere."""
        return self._folder / name / CHECKPOINT if self._folder is not None and self._checkpoints else None

    def drop(self, name: str) -> None:
        """Forgets a vector that is not needed any more."""
        self._memory.pop(_vector_file(name), None)
        if self._folder is not None:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _in_turn(self, names: Iterable[str]) -> Iterator[str]:
        waiting = list(names)
        while waiting:
            free = (place for place, name in enumerate(waiting) if not self._is_being_made(name))
            yield waiting.pop(next(free, 0))

    def _is_being_made(self, name: str) -> bool:
        return self._folder is not None and is_being_made(self._folder / _value_file(name))

    def _get(
        self, make: Callable[[], T], file: str, save: Callable[[Path, T], None], load: Callable[[Path], T],
        shared: bool = False,
    ) -> T:  # fmt: skip
        if self._folder is None:
            if file not in self._memory:
                self._memory[file] = make()
            kept: T = self._memory[file]
            return kept
        path = self._folder / file
        if path.exists():
            return load(path)
        with nullcontext() if shared else making(path):
            if path.exists():  # by now
                return load(path)
            made = make()
            save(path, made)
            return made


def _differences(name: str, theirs: Any, mine: Any) -> list[str]:
    """The fields in which two JSON values differ, such as "plan.density: 0.1 there, 0.2 here"."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted({*theirs, *mine})
        parts = [_differences(f"{name}.{key}".lstrip("."), theirs.get(key), mine.get(key)) for key in keys]
        return [found for part in parts for found in part]
    return [] if theirs == mine else [f"{name}: {theirs!s:.60} there, {mine!s:.60} here"]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _value_file(name: str) -> str:
    return f"{name}.json"


def _vector_file(name: str) -> str:
    return f"{name}/{vector_file.FILE}"
