"""The README's cost table and the efficiency plot, from the JSON that was measured: ``python benchmarks/render.py``.

Writes ``table.md``, ``summary.md`` and ``efficiency.png`` beside the results.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aims import aims
from efficiency import plot
from show import BASELINE, COUNTED, LEGEND, ORDER, SHOWN, VARIANTS, figures, heading, notes, precision, rows_of, short

from talos_fast.markdown import grid

RESULTS = Path(__file__).parent / "results"
MODELS = ("ViT-B-32", "ViT-L-14", "T5-Large")
# What the README shows of time and memory: every method as `finetune` runs it, and what compiling changes.
SUMMARY = [(method, "eager") for method in ORDER] + [(BASELINE, "compiled"), ("talos", "compiled")]


def load(folder: Path) -> list[dict[str, Any]]:
    """The measured tables, GPUs first, in the order of the paper."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("table_*.json"))]
    known = [content for content in found if any("missing" not in row for row in content["rows"])]
    return sorted(known, key=lambda c: (c["device"] != "cuda", (*MODELS, c["model"]).index(c["model"]), c["model"]))


def markdown(contents: list[dict[str, Any]]) -> str:
    """The aims; then one table a model, machine and variant; what nobody has measured is named."""
    lines = ["**The aims, for talos over full fine-tuning**", "", grid(aims(contents, MODELS)), "", LEGEND, ""]
    for note in notes(contents):
        lines += [note.replace("* ", r"\* "), ""]
    for content in contents:
        lines += [*_tables(content), *_over_the_paper(content)]
    missing = [model for model in MODELS if model not in {content["model"] for content in contents}]
    if missing:
        lines += [f"Not measured: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def _tables(content: dict[str, Any]) -> Iterator[str]:
    for variant in VARIANTS:
        rows = {row["method"]: row for row in rows_of(content) if row["variant"] == variant}
        if rows:
            yield from (f"**{heading(content)}**; {variant}: {content['variants'][variant]}", "")
            table = [["method", *SHOWN, *COUNTED]]
            for method in dict.fromkeys((*ORDER, *rows)):
                row = rows.get(method, {"missing": "no run"})
                table.append([method, *figures(content, row)])
            yield from (grid(table), "")


def _over_the_paper(content: dict[str, Any]) -> Iterator[str]:
    """Each method and variant over full fine-tuning as the paper ran it; times where one run timed both in turn."""
    paper = f"over full fine-tuning as the paper ran it, in {precision(content)}"
    yield from (f"**{content['model']}, {content['device_name']}**; {paper}", "")
    shown = [(variant, column) for variant in VARIANTS for column in ("total", "peak")]
    table = [["method", *(f"{variant}: {column}" for variant, column in shown)]]
    table += [[method, *(short(content, method, *one, against="paper") for one in shown)] for method in ORDER]
    yield from (grid(table), "")


def summary(contents: list[dict[str, Any]]) -> str:
    """Iteration time, optimizer's step and peak memory: full fine-tuning's, and of the others their ratio to it."""
    shown = ("total", "step", "peak")
    table = [["method", *(f"{content['model']}: {column}" for content in contents for column in shown)]]
    for method, variant in SUMMARY:
        columns = [short(content, method, variant, column) for content in contents for column in shown]
        table.append([method if variant == "eager" else f"{method}, {variant}", *columns])
    return grid(table) + "\n"


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
