"""What the cost of `talos` was to be at most, over full fine-tuning's, and what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from show import cells, row_of


@dataclass(frozen=True)
class Aim:
    """A ratio of `talos` to full fine-tuning.

    Args:
        device: "cpu" or "cuda".
        name: in words.
        column: of the cost table.
        variant, against: of `talos`, and of full fine-tuning.
        at_most: model -> the largest ratio that was aimed at.
    """

    device: str
    name: str
    column: str
    variant: str
    against: str
    at_most: dict[str, float]


def _vision(b32: float, l14: float) -> dict[str, float]:
    return {"ViT-B-32": b32, "ViT-L-14": l14}


def _all(b32: float, l14: float, t5: float) -> dict[str, float]:
    return _vision(b32, l14) | {"T5-Large": t5}


AIMS = (
    Aim("cpu", "CPU: iteration, both eager", "total", "eager", "eager", _vision(0.75, 0.75)),
    Aim("cpu", "CPU: memory above the model, both eager", "above the model", "eager", "eager", _vision(0.60, 0.60)),
    Aim("cuda", "GPU: step over fused AdamW's", "step", "eager", "eager", _all(0.20, 0.20, 0.20)),
    Aim("cuda", "GPU: clip and step", "clip+step", "eager", "eager", _all(0.15, 0.15, 0.15)),
    Aim("cuda", "GPU: iteration, eager over the paper variant", "total", "eager", "paper", _all(0.40, 0.25, 0.40)),
    Aim("cuda", "GPU: iteration, both compiled", "total", "compiled", "compiled", _all(0.70, 0.65, 0.65)),
    Aim("cuda", "GPU: peak memory", "peak", "eager", "eager", _all(0.60, 0.35, 0.35)),
)


def aims(contents: list[dict[str, Any]], models: Sequence[str]) -> list[list[str]]:
    """A table: a row an aim, a column a model; ``0.69 (≤ 0.75)``, with what is missed or not measured named so."""
    known = {(content["device"], content["model"]): content for content in contents}
    return [["aim", *models], *([aim.name, *(_reached(aim, known, model) for model in models)] for aim in AIMS)]


def _reached(aim: Aim, known: dict[tuple[str, str], dict[str, Any]], model: str) -> str:
    content = known.get((aim.device, model))
    row = None if content is None else row_of(content, "talos", aim.variant)
    cell = None if content is None or row is None else cells(content, row, aim.against).get(aim.column)
    found, limit = "not measured" if cell is None else cell.times, aim.at_most.get(model)
    if limit is None:
        return f"{found} (no aim)"
    return f"{found} (≤ {limit:.2f}{', missed' if cell is not None and cell.ratio > limit else ''})"
