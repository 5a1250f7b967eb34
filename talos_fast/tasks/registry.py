"""A task by its source: files, a Hugging Face data set, or one that comes with this package."""

from collections.abc import Sequence
from pathlib import Path

from talos_fast.errors import TalosError, needs
from talos_fast.tasks.base import Task
from talos_fast.tasks.files import from_files
from talos_fast.tasks.hub import from_hub


def load(
    source: str | Path,
    *,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Task:
    """Load a task, by what the commands' ``--data`` takes.

    Args:
        source: a folder of images, an `.npz`, `.jsonl` or `.jsonl.gz` file, see `from_files`; `hub:NAME@REVISION` or
            `hub:FOLDER`, see `from_hub`; or `demo:NAME`, a task of the embedded model.
        name, class_names, templates: instead of the source's own; not for `demo:`.
        seed: of a validation split that the source does not have; of everything drawn in `demo:`.

    Example:
        >>> load("demo:digits").name
        'digits'

    Raises:
        TalosError: as `from_files` and `from_hub`; a task of the demo that is not there, or whose names are given.
    """
    kind, _, rest = str(source).partition(":")
    if kind == "hub":
        place, _, revision = rest.partition("@")
        if not place:
            raise TalosError(f"{source}: give hub:NAME@REVISION or hub:FOLDER")
        return from_hub(
            place, revision=revision or None, name=name, class_names=class_names, templates=templates or (), seed=seed
        )
    if kind != "demo":
        return from_files(source, name=name, class_names=class_names, templates=templates, seed=seed)
    with needs("demo"):
        from talos_fast.demo.tasks import TASKS
    if rest not in TASKS:
        raise TalosError(f"{source}: the embedded tasks are {', '.join(TASKS)}")
    if (name, class_names, templates) != (None, None, None):
        raise TalosError(f"{source} has its own name, class names and templates; leave these out")
    return TASKS[rest](seed)
