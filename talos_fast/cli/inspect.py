"""``talos-fast inspect`` and ``talos-fast interference``."""

from pathlib import Path
from typing import Annotated

import typer

import talos_fast as talos
from talos_fast import writing
from talos_fast.cli import options as o
from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest
from talos_fast.interference import COLUMNS
from talos_fast.mask import Mask
from talos_fast.plots import plot_interference, plot_mask
from talos_fast.plots.figure import require_picture
from talos_fast.structure import KINDS, density_by_part
from talos_fast.tables import show, table
from talos_fast.task_vector import TaskVector
from talos_fast.vector_file import FILE

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask (.safetensors file) or a task vector (folder).")],
    plot: Annotated[Path | None, typer.Option(help="Draw the mask's structure: .png, .pdf or .svg.")] = None,
) -> None:
    """Density by layer and kind, size, base, and how it was made."""
    require_picture(plot, "--plot")
    if not path.exists():
        raise TalosError(f"{path}: no such file or folder")
    if (path / "merge.json").is_file():
        raise TalosError(f"{path}: what merge wrote, described in its merge.json; give a mask or a task vector")
    thing = o.load_vector(path) if path.is_dir() or path.name == FILE else Mask.load(path)
    mask = thing.mask() if isinstance(thing, TaskVector) else thing
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    typer.echo(f"{path}: {thing}")
    base = digest(thing.base) if thing.base else "unknown"
    typer.echo(f"file: {size / 1e6:.3f} MB; base: {base} ({len(thing.base)} tensors)")
    for key, value in thing.info.items():
        typer.echo(f"  {key}: {value}")
    counts = density_by_part(mask)
    kinds = [kind for kind in KINDS if any(kind == k for _, k in counts)]
    of_vector = isinstance(thing, TaskVector)  # which knows nothing of tensors that it leaves alone
    title = "fraction that moved, of the tensors that moved" if of_vector else "fraction that trains"
    rows = [
        [layer, *(f"{counts[layer, kind].density:.3f}" if (layer, kind) in counts else "" for kind in kinds)]
        for layer in dict.fromkeys(layer for layer, _ in counts)
    ]
    show(table(["layer", *kinds], rows, title))
    if plot is not None:
        plot_mask(mask, plot, title=str(path))
        typer.echo(f"{plot}: the structure of the {'task vector' if of_vector else 'mask'}")


@app.command()
def interference(
    vectors: Annotated[list[Path], typer.Argument(help="Task vectors (folders) of one base.")],
    out: Annotated[Path | None, typer.Option(help="JSON of every figure.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the four matrices: .png, .pdf or .svg.")] = None,
) -> None:
    """Where task vectors get in each other's way: cosine, overlap, sign conflicts and shared norm of every pair."""
    writing.require_file(out, "--out")
    require_picture(plot, "--plot")
    if len(vectors) < 2:
        raise TalosError(f"{vectors[0]}: one vector has nothing to get in its way; give two or more")
    report = talos.interference([o.load_vector(path) for path in vectors], names=_names(vectors))
    show(table(COLUMNS, report.rows()))
    if out is not None:
        writing.write_json(out, report.to_json())
    if plot is not None:
        plot_interference(report, plot)


def _names(paths: list[Path]) -> list[str]:
    """The folders' own names, or the whole paths where two are the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
