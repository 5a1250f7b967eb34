"""Printing tables of results to a terminal."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from talos_fast import report
from talos_fast.study import StudyResult


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table."""
    made = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        made.add_row(*row)
    return made


def show(*things: Table | str) -> None:
    """Prints tables as wide as they must be, for a number or a name that is cut off says nothing, and texts."""
    for thing in things:
        console = Console(markup=False, emoji=False)  # names of tasks and folders are no markup
        if isinstance(thing, Table):
            wanted = console.measure(thing, options=console.options.update_width(10_000)).maximum
            console.width = max(console.width, wanted)
        console.print(thing)


def show_means(result: StudyResult) -> None:
    """Prints a study's methods, a row each, and what the columns mean."""
    means = table(report.COLUMNS, report.rows(result), "means over tasks, test accuracy in %")
    show(means, report.COLUMNS_MEANING)
