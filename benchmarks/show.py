"""A cost table as text: each figure, its ratio to full fine-tuning in the same variant, and the paper's ratio."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paper

from talos_fast.methods import METHODS
from talos_fast.profiling.measure import COLUMNS, Timings
from talos_fast.profiling.work import Work

TIMES = ("fwd-bwd", "step", "clip+step", "total")
MEMORY = ("peak", "above the model")
SHOWN = (*TIMES, *MEMORY)
COUNTED = ("GFLOP (floor)", "kept", "step moves", "graph breaks")
VARIANTS = ("paper", "eager", "compiled")
BASELINE = "nonlinear"
ORDER = tuple(METHODS)
LEGEND = """\
A figure is the median over the rounds, ×its ratio to full fine-tuning in the same variant, [the least and the largest
round], (the paper's ratio). Each row was timed in turn with full fine-tuning of its own run, and its ratio is the
median of the rounds' ratios: the milliseconds of two rows, divided, do not give it. The peak is the model and what an
iteration adds to it, as the paper's is; "above the model" is what it adds. The last columns are counted: GFLOP of the
matrix products of an iteration (with the gradients of selected rows only, where that is less), bytes kept for the
backward pass, bytes that the optimizer's step moves, graph breaks of what is compiled."""
BUSY = "† the host was busy for nearly all of it: it may be the host's time, for which the GPU waited"
ALONE = "* measured after full fine-tuning, not in turn with it: memory does not hold both"


@dataclass(frozen=True)
class Cell:
    """One figure.

    Args:
        rounds: seconds of each round, or the bytes of the one measurement.
        ratios: of each round to full fine-tuning's; none for full fine-tuning itself.
        paper: the paper's ratio, where it has one.
        alone: whether full fine-tuning was measured before it and not beside it, for lack of memory.
    """

    rounds: list[float]
    ratios: list[float]
    paper: float | None
    alone: bool = False

    @property
    def ratio(self) -> float:
        """The median over the rounds; 1 for full fine-tuning itself."""
        return statistics.median(self.ratios or [1.0])

    @property
    def times(self) -> str:
        """The ratio, with a star if it was measured alone; nothing for full fine-tuning itself."""
        return f"{self.ratio:.2f}" + "*" * self.alone if self.ratios else ""

    @property
    def known(self) -> str:
        """The paper's ratio in parentheses."""
        return "" if self.paper is None else f" ({self.paper:.2f})"


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in the order of the paper, variants together."""
    last = len(ORDER)  # methods that the paper does not have
    place = {method: number for number, method in enumerate(ORDER)}
    return sorted(content["rows"], key=lambda row: (VARIANTS.index(row["variant"]), place.get(row["method"], last)))


def row_of(content: dict[str, Any], method: str, variant: str) -> dict[str, Any] | None:
    """A row that was measured, or None."""
    rows = (r for r in content["rows"] if (r["method"], r["variant"]) == (method, variant))
    return next((row for row in rows if "missing" not in row), None)


def cells(content: dict[str, Any], row: dict[str, Any], against: str | None = None) -> dict[str, Cell]:
    """Column -> figure of a measured row; without the columns that it, or what they are divided by, lacks.

    Args:
        content: the file.
        row: one of its rows.
        against: the variant of full fine-tuning that ratios are to; default: the row's own.
    """
    against, found = against or row["variant"], {}
    itself = (row["method"], row["variant"]) == (BASELINE, against)
    base = (row_of(content, BASELINE, against) or {}) | {"seconds": row["baselines"].get(against)}
    rounds, theirs = _rounds(content, row), _rounds(content, base)
    for column in rounds.keys() & theirs.keys():
        ratios = [] if itself else [a / b for a, b in zip(rounds[column], theirs[column], strict=True)]
        known = paper.ratio(content["model"], row["method"], column)
        found[column] = Cell(rounds[column], ratios, known, column in TIMES and row.get("alone", False))
    return found


def _rounds(content: dict[str, Any], row: dict[str, Any]) -> dict[str, list[float]]:
    """Column -> what was measured: seconds of each round, bytes once."""
    timings, above = row.get("seconds"), row.get("peak_bytes")
    found = {} if timings is None else {column: Timings(timings).of(*COLUMNS[column]) for column in TIMES}
    if above is not None:
        found |= {"peak": [above + content["model_bytes"]], "above the model": [above]}
    return found


def counted(content: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What one iteration must do, counted: the columns `COUNTED`, empty where nothing was.

    GFLOP of matrix products, and the least that gives the same step where that is less; bytes kept for the backward
    pass; bytes that the optimizer's step moves; graph breaks. What is compiled computes what is eager.
    """
    variant = "eager" if row["variant"] == "compiled" else row["variant"]
    counting = row_of(content, row["method"], variant) or {}
    found = ["", ""]
    if "work" in counting:
        work = Work(**counting["work"])
        floor = f" ({_giga(work.floor)})" if work.floor < work.done else ""
        found = [_giga(work.done) + floor, size(work.saved_bytes)]
    return [*found, size(row["step_bytes"]) if "step_bytes" in row else "", str(row.get("graph_breaks", ""))]


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def figures(content: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """A row in words: the columns `SHOWN` and `COUNTED`."""
    if "missing" in row:
        return [f"not measured: {row['missing']}", *[""] * (len(SHOWN) + len(COUNTED) - 1)]
    found = cells(content, row)
    first, *others = (figure(column, found.get(column)) for column in SHOWN)
    return [first + " †" * row.get("host_was_busy", False), *others, *counted(content, row)]


def text(content: dict[str, Any]) -> str:
    """The table for a terminal."""
    return "\n".join(_lines(content))


def _lines(content: dict[str, Any]) -> Iterator[str]:
    yield from (heading(content), LEGEND)
    table = [["", *SHOWN, *COUNTED]]
    table += [[f"{row['method']}, {row['variant']}", *figures(content, row)] for row in rows_of(content)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(f"{value:{width}s}" for value, width in zip(row, widths, strict=True)).rstrip()
    yield from notes([content])


def notes(contents: list[dict[str, Any]]) -> list[str]:
    """What the marks mean that stand in the tables."""
    rows = [row for content in contents for row in content["rows"]]
    marks = (("alone", ALONE), ("host_was_busy", BUSY))
    return [meaning for key, meaning in marks if any(row.get(key) for row in rows)]


def heading(content: dict[str, Any]) -> str:
    """What was measured, and where."""
    where = f"{content['device_name']}, {content['threads']} threads, torch {content['torch']}"
    if "inputs" not in content:
        return f"{content['model']}: {where}"
    return (
        f"{content['model']}: {content['inputs']}, {content['parameters']:,} parameters ({content['weights']}), "
        f"{precision(content)}; {where}"
    )


def precision(content: dict[str, Any]) -> str:
    """What all variants compute in, the paper's too."""
    return "bf16 autocast" if content["bf16"] else "fp32"


def measured(column: str, cell: Cell) -> str:
    """The median of times, or the size, with its unit."""
    middle = statistics.median(cell.rounds)
    return f"{1e3 * middle:.1f} ms" if column in TIMES else size(middle)


def size(nbytes: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def figure(column: str, cell: Cell | None) -> str:
    """``12.3 ms ×0.44 [0.41–0.47] (0.34)``; of full fine-tuning itself ``12.3 ms [12.1–12.9]``."""
    if cell is None:
        return "not measured"
    value = measured(column, cell)
    if not cell.ratios:
        return value + _spread([1e3 * seconds for seconds in cell.rounds], 1)
    return f"{value} ×{cell.times}{_spread(cell.ratios, 2)}{cell.known}"


def short(content: dict[str, Any], method: str, variant: str, column: str, against: str | None = None) -> str:
    """``0.44 (0.34)``, the ratio and the paper's; of full fine-tuning itself the figure. For `against` see `cells`."""
    row = row_of(content, method, variant)
    cell = None if row is None else cells(content, row, against).get(column)
    if cell is None:
        return "not measured"
    return f"{cell.times}{cell.known}" if cell.ratios else measured(column, cell)


def _spread(rounds: list[float], digits: int) -> str:
    return f" [{min(rounds):.{digits}f}–{max(rounds):.{digits}f}]" if len(rounds) > 1 else ""
