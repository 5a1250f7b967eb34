"""``talos-fast inspect``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest
from talos_fast.mask import Mask
from talos_fast.plots import plot_mask
from talos_fast.structure import KINDS, density_by_part
from talos_fast.task_vector import TaskVector

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask (.safetensors file) or a task vector (folder).")],
    plot: Annotated[Path | None, typer.Option(help="Draw the mask's structure: .png, .pdf or .svg.")] = None,
) -> None:
    """Density by layer and kind, size, base, and how it was made."""
    if not path.exists():
        raise TalosError(f"{path}: no such file or folder")
    thing = TaskVector.from_pretrained(path) if path.is_dir() else Mask.load(path)
    mask = thing.mask() if isinstance(thing, TaskVector) else thing
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    typer.echo(f"{path}: {thing}")
    base = digest(thing.base) if thing.base else "unknown"
    typer.echo(f"file: {size / 1e6:.3f} MB; base: {base} ({len(thing.base)} tensors)")
    for key, value in thing.info.items():
        typer.echo(f"  {key}: {value}")
    counts = density_by_part(mask)
    kinds = [kind for kind in KINDS if any(kind == k for _, k in counts)]
    table = Table("layer", *kinds, title="fraction that trains")
    for layer in sorted({layer for layer, _ in counts}):
        cells = [f"{counts[layer, kind].density:.3f}" if (layer, kind) in counts else "" for kind in kinds]
        table.add_row("outside" if layer < 0 else str(layer), *cells)
    Console().print(table)
    if plot is not None:
        plot_mask(mask, plot, title=str(path))
        typer.echo(f"{plot}: the structure of the mask")
