"""Making and saving a figure, without a display and without pyplot's global state."""

from pathlib import Path
from typing import Any

from talos_fast.errors import TalosError, needs
from talos_fast.writing import atomic, require_file


def new_figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure of a size in inches and its axes, a 2-d array.

    Raises:
        TalosError: matplotlib is not installed.
    """
    with needs("plots"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid)


def require_picture(path: Path | None, option: str) -> None:
    """Refuses a picture that `save` could not write, before the work whose result it shows.

    Raises:
        TalosError: names the option.
    """
    require_file(path, option)
    if path is not None:
        _kind(path)


def save(figure: Any, path: str | Path) -> None:
    """Writes a PNG, PDF or SVG, atomically.

    Raises:
        TalosError: a path that ends in none of these, or that cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    kind = _kind(Path(path))
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names and paths may hold dollar signs
    with atomic(Path(path)) as temporary, rc_context({"text.parse_math": False}):
        figure.savefig(temporary, dpi=130, format=kind)


def _kind(path: Path) -> str:
    kind = path.suffix.removeprefix(".").lower() or "png"
    if kind not in ("png", "pdf", "svg"):
        raise TalosError(f"{path}: pictures are .png, .pdf or .svg, found .{kind}; give one of these endings")
    return kind
