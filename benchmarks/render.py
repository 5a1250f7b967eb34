"""The README's cost table and the efficiency plot, from the JSON that was measured: ``python benchmarks/render.py``.

Writes ``table.md``, ``summary.md`` and ``efficiency.png`` beside the results.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from show import ALONE, COUNTED, ORDER, SHOWN, VARIANTS, Cell, cells, counted, heading, measured, rows_of

from talos_fast.storage import atomic

RESULTS = Path(__file__).parent / "results"
COUNTS = """\
The last three columns are counted, not measured: GFLOP of the matrix products of an iteration (with the gradients of
selected rows only, where that is less), bytes kept for the backward pass, bytes that the optimizer's step moves."""
MODELS = ("ViT-B-32", "ViT-L-14", "T5-Large")


def load(folder: Path) -> list[dict[str, Any]]:
    """The measured tables, GPUs first, in the order of the paper."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("table_*.json"))]
    known = [content for content in found if any("missing" not in row for row in content["rows"])]
    return sorted(known, key=lambda c: (c["device"] != "cuda", (*MODELS, c["model"]).index(c["model"]), c["model"]))


def markdown(contents: list[dict[str, Any]]) -> str:
    """One table a model, machine and variant; what nobody has measured is named."""
    lines = [line for content in contents for line in _table(content)]
    lines += [COUNTS, ""]
    if any(row.get("alone") for content in contents for row in content["rows"]):
        lines += [ALONE.replace("* ", r"\* "), ""]
    missing = [model for model in MODELS if model not in {content["model"] for content in contents}]
    if missing:
        lines += [f"Not measured: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _table(content: dict[str, Any]) -> Iterator[str]:
    peak = "peak" if content["device"] == "cuda" else "peak above the model"
    names = ("method", *SHOWN[:-1], peak, *COUNTED)
    for variant in VARIANTS:
        rows = {row["method"]: row for row in rows_of(content) if row["variant"] == variant}
        if rows:
            yield f"**{heading(content)}**; {variant}: {content['variants'][variant]}"
            yield ""
            yield _row(names)
            yield _row(["---"] * len(names))
            for method in dict.fromkeys((*ORDER, *rows)):
                row = rows.get(method)
                yield _row([method, *(["not measured"] * (len(names) - 1) if row is None else _figures(content, row))])
            yield ""


def _row(columns: Any) -> str:
    return "| " + " | ".join(columns) + " |"


def _figures(content: dict[str, Any], row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [f"not measured: {row['missing']}", *[""] * (len(SHOWN) + len(COUNTED) - 1)]
    found = cells(content, row)
    return [*(_figure(column, found.get(column)) for column in SHOWN), *counted(content, row)]


def _figure(column: str, cell: Cell | None) -> str:
    if cell is None:
        return "not measured"
    value = measured(column, cell)
    paper_ratio = "" if cell.paper is None else f" (paper {cell.paper:.2f})"
    return f"{value}, ×{cell.times}{paper_ratio}" if cell.times else value


def summary(contents: list[dict[str, Any]]) -> str:
    """Iteration time, optimizer step and peak memory over full fine-tuning's, as `finetune` runs the methods."""
    shown = ("total", "step", "peak")
    lines = [_row(["method", *(f"{content['model']}: {column}" for content in contents for column in shown)])]
    lines.append(_row(["---"] * (1 + len(shown) * len(contents))))
    for method in ORDER:
        columns = []
        for content in contents:
            row = next((r for r in rows_of(content) if (r["method"], r["variant"]) == (method, "eager")), None)
            found = {} if row is None or "missing" in row else cells(content, row)
            columns += [_ratio(found.get(column)) for column in shown]
        lines.append(_row([method, *columns]))
    return "\n".join(lines) + "\n"


def _ratio(cell: Cell | None) -> str:
    if cell is None or cell.ratio is None:
        return "not measured"
    return cell.times if cell.paper is None else f"{cell.times} ({cell.paper:.2f})"


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of an iteration, both over full fine-tuning; hollow: the paper's figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(contents), 4.2), layout="constrained")
    methods = list(dict.fromkeys((*ORDER, *(row["method"] for content in contents for row in content["rows"]))))
    colours = {method: f"C{number}" for number, method in enumerate(methods)}
    for axis, content in zip(figure.subplots(1, len(contents), squeeze=False)[0], contents, strict=True):
        for row in rows_of(content):
            found = {} if "missing" in row else cells(content, row)
            if row["variant"] == "paper" or not {"total", "peak"} <= found.keys():
                continue
            x, y = found["total"], found["peak"]
            marker = "o" if row["variant"] == "eager" else "s"
            axis.plot(
                x.ratio, y.ratio, marker, color=colours[row["method"]], label=f"{row['method']}, {row['variant']}"
            )
            if row["variant"] == "eager" and x.paper is not None and y.paper is not None:
                axis.plot(x.paper, y.paper, "o", color=colours[row["method"]], fillstyle="none")
        axis.set(
            xlabel="iteration time / full fine-tuning",
            ylabel="peak memory / full fine-tuning",
            xlim=(0, None),
            ylim=(0, None),
        )
        axis.plot([], [], "o", color="black", fillstyle="none", label="the paper's, on a GPU")
        axis.set_title(f"{content['model']}, {content['device_name']}", fontsize=9)
        axis.legend(fontsize=7)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Renders what is in the results folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    folder = parser.parse_args().results
    contents = load(folder)
    if not contents:
        parser.error(f"no measured table_*.json in {folder}; run pytest benchmarks/table.py --benchmark first")
    (folder / "table.md").write_text(markdown(contents))
    (folder / "summary.md").write_text(summary(contents))
    plot(contents, folder / "efficiency.png")
    print(f"{folder / 'table.md'}, {folder / 'summary.md'}, {folder / 'efficiency.png'}: {len(contents)} tables")


if __name__ == "__main__":
    main()
