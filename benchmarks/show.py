"""A cost table as text: each figure, its ratio to full fine-tuning in the same variant, and the paper's ratio."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import paper

from talos_fast.profiling.measure import COLUMNS, Timings
from talos_fast.profiling.work import Work

SHOWN = ("fwd-bwd", "step", "clip+step", "total", "peak")
COUNTED = ("GFLOP (floor)", "kept", "step moves")
VARIANTS = ("paper", "eager", "compiled")
ALONE = "* measured after full fine-tuning, not in turn with it: memory does not hold both"
ORDER = ("nonlinear", "linearized", "l-lora", "lota", "talos")


@dataclass(frozen=True)
class Cell:
    """One figure.

    Args:
        value: seconds, or bytes for "peak".
        low, high: the least and the largest of the rounds; the value itself for "peak".
        ratio: to full fine-tuning in the same variant; for times the median over the rounds.
        paper: the paper's ratio, where it has one.
        alone: whether full fine-tuning was measured before it and not beside it, for lack of memory.
    """

    value: float
    low: float
    high: float
    ratio: float | None
    paper: float | None
    alone: bool = False

    @property
    def times(self) -> str:
        """The ratio, with a star if it was measured alone."""
        return "" if self.ratio is None else f"{self.ratio:.2f}" + "*" * self.alone


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in the order of the paper, variants together."""
    last = len(ORDER)  # methods that the paper does not have
    place = {method: number for number, method in enumerate(ORDER)}
    return sorted(content["rows"], key=lambda row: (VARIANTS.index(row["variant"]), place.get(row["method"], last)))


def cells(content: dict[str, Any], row: dict[str, Any], against: str | None = None) -> dict[str, Cell]:
    """Column -> figure of a measured row.

    Args:
        content: the file.
        row: one of its rows.
        against: the variant of full fine-tuning that ratios are to; default: the row's own.
    """
    against = against or row["variant"]
    mine, base = Timings(row["seconds"]), row["baselines"].get(against)
    found = {}
    for column in SHOWN[:-1]:
        times = mine.of(*COLUMNS[column])
        ratio = None if base is None else mine.ratio(Timings(base), *COLUMNS[column])
        known = paper.ratio(content["model"], row["method"], column)
        found[column] = Cell(
            mine.median(*COLUMNS[column]), min(times), max(times), ratio, known, row.get("alone", False)
        )
    peak = peak_bytes(content, row)
    if peak is not None:
        full = [r for r in content["rows"] if (r["method"], r["variant"]) == ("nonlinear", against)]
        whole = peak_bytes(content, full[0]) if full else None
        ratio = peak / whole if whole else None
        found["peak"] = Cell(peak, peak, peak, ratio, paper.ratio(content["model"], row["method"], "peak"))
    return found


def peak_bytes(content: dict[str, Any], row: dict[str, Any]) -> int | None:
    """On a GPU the peak with the model in it, as in the paper; on the CPU what lies above the model."""
    above: int | None = row.get("peak_bytes")
    if above is None:
        return None
    return above + (content["model_bytes"] if content["device"] == "cuda" else 0)


def counted(content: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What one iteration must do, counted: the columns `COUNTED`, empty where nothing was.

    GFLOP of matrix products, and the least that gives the same step where that is less; bytes kept for the backward
    pass; bytes that the optimizer's step moves. What is compiled computes what is eager.
    """
    variant = "eager" if row["variant"] == "compiled" else row["variant"]
    rows = (r for r in content["rows"] if (r["method"], r["variant"]) == (row["method"], variant))
    fields = next((r["work"] for r in rows if "work" in r), None)
    found = ["", ""]
    if fields is not None:
        work = Work(**fields)
        floor = f" ({_giga(work.floor)})" if work.floor < work.done else ""
        found = [_giga(work.done) + floor, size(work.saved_bytes)]
    return [*found, size(row["step_bytes"]) if "step_bytes" in row else ""]


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def text(content: dict[str, Any]) -> str:
    """The table for a terminal."""
    return "\n".join(_lines(content))


def _lines(content: dict[str, Any]) -> Iterator[str]:
    yield heading(content)
    yield "each figure: median, × full fine-tuning in the same variant (the paper's ratio); at the end what is counted"
    peak = "peak" if content["device"] == "cuda" else "peak over model"
    yield f"{'':22s}" + "".join(f"{name:>25s}" for name in (*SHOWN[:-1], peak)) + _wide(COUNTED)
    for row in rows_of(content):
        name = f"{row['method']}, {row['variant']}"
        if "missing" in row:
            yield f"{name:22s}  not measured: {row['missing']}"
            continue
        found = cells(content, row)
        figures = "".join(f"{figure(column, found.get(column)):>25s}" for column in SHOWN)
        yield f"{name:22s}{figures}{_wide(counted(content, row))}"
    if any(row.get("alone") for row in content["rows"]):
        yield ALONE


def _wide(columns: Iterable[str]) -> str:
    return "".join(f"{column:>17s}" for column in columns)


def heading(content: dict[str, Any]) -> str:
    """What was measured, and where."""
    where = f"{content['device_name']}, {content['threads']} threads, torch {content['torch']}"
    if "inputs" not in content:
        return f"{content['model']}: {where}"
    precision = "bf16 autocast" if content["bf16"] else "fp32"
    return (
        f"{content['model']}: {content['inputs']}, {content['parameters']:,} parameters ({content['weights']}), "
        f"{precision}; {where}"
    )


def measured(column: str, cell: Cell) -> str:
    """The figure with its unit."""
    if column != "peak":
        return f"{1e3 * cell.value:.1f} ms"
    return size(cell.value)


def size(nbytes: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def figure(column: str, cell: Cell | None) -> str:
    """``12.3 ms ×0.44 (0.34)``."""
    if cell is None:
        return "not measured"
    value = measured(column, cell)
    ratio = f" ×{cell.times}" if cell.times else ""
    return value + ratio + ("" if cell.paper is None else f" ({cell.paper:.2f})")
