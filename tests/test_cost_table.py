"""How the cost table is shown: ratios, spread, memory, aims, the plot."""

import sys
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import render
import show
from aims import aims
from efficiency import points

MODELS = render.MODELS


def phases(*totals: float) -> dict[str, list[float]]:
    """Rounds of which the forward and backward pass takes nine tenths, the step one."""
    seconds = {"forward_backward": [0.9 * t for t in totals], "step": [0.1 * t for t in totals]}
    return seconds | {"clip": [0.0] * len(totals), "release": [0.0] * len(totals)}


def row(method: str, variant: str, seconds: Any, above: int | None, alone: bool = False, **baselines: Any) -> Any:
    shown = {"method": method, "variant": variant, "seconds": seconds, "alone": alone, "peak_bytes": above}
    return shown | {"baselines": baselines} | ({"graph_breaks": 0} if variant == "compiled" else {})


def table(device: str = "cpu", talos: float = 0.6) -> dict[str, Any]:
    """Full fine-tuning of ViT-B/32 in 1, 2 and 4 s over a model of 100 bytes, as the paper ran it in twice that."""
    full, twice, sparse = phases(1.0, 2.0, 4.0), phases(2.0, 4.0, 8.0), phases(talos, 2.5 * talos, 4 * talos)
    rows = [
        row("nonlinear", "paper", twice, 500, paper=twice),
        row("nonlinear", "eager", full, 300, paper=twice, eager=full),
        row("linearized", "eager", twice, 400, alone=True, eager=full),
        row("talos", "eager", sparse, 100, paper=twice, eager=full),
        row("nonlinear", "compiled", full, 300, compiled=full),
        row("talos", "compiled", sparse, 100, compiled=full),
    ]
    about = {"device": device, "device_name": "a machine", "threads": 2, "torch": "2", "bf16": device == "cuda"}
    words = {"inputs": "1 image", "parameters": 25, "weights": "random", "variants": dict.fromkeys(show.VARIANTS, "so")}
    return {"model": "ViT-B-32", "model_bytes": 100, "rows": rows} | about | words


def test_a_figure_has_its_spread_and_its_ratio_that_of_each_round():
    content = table()
    talos, full = (show.row_of(content, method, "eager") for method in ("talos", "nonlinear"))
    total = show.cells(content, talos)["total"]
    assert total.ratios == pytest.approx([0.6, 0.75, 0.6])
    assert show.figure("total", total) == "1500.0 ms ×0.60 [0.60–0.75] (0.44)"  # 1500 / 2000 is 0.75
    assert show.figure("total", show.cells(content, full)["total"]) == "2000.0 ms [1000.0–4000.0]"
    printed = show.text(content)
    assert "×0.60 [0.60–0.75] (0.44)" in printed and "divided, do not give it" in printed
    assert "1500.0 ms ×0.60 [0.60–0.75] (0.44)" in render.markdown([content])


def test_a_row_says_where_the_host_was_busy():
    content = table("cuda")
    assert "†" not in show.text(content) + render.markdown([content])
    show.row_of(content, "talos", "eager")["host_was_busy"] = True
    for printed in (show.text(content), render.markdown([content])):
        assert printed.count(" † ") == 1 and show.BUSY in printed
    assert show.figures(content, show.row_of(content, "talos", "eager"))[0].endswith("†")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_peak_includes_the_model_as_the_papers_does(device):
    content = table(device)
    found = show.cells(content, show.row_of(content, "talos", "eager"))
    assert (found["peak"].rounds, found["peak"].times) == ([200], "0.50") and found["peak"].paper is not None
    assert (found["above the model"].rounds, found["above the model"].times) == ([100], "0.33")
    assert found["above the model"].paper is None


def test_variants_are_put_over_the_papers_where_one_run_timed_both():
    content = table()
    assert show.short(content, "talos", "eager", "total", against="paper") == "0.30 (0.44)"
    assert show.short(content, "talos", "eager", "peak", against="paper") == "0.33 (0.72)"
    assert show.short(content, "nonlinear", "eager", "total", against="paper") == "0.50 (1.00)"
    assert show.short(content, "nonlinear", "paper", "total", against="paper") == "4000.0 ms"
    assert show.short(content, "talos", "compiled", "total", against="paper") == "not measured"
    _, _, block = render.markdown([content]).partition("over full fine-tuning as the paper ran it, in fp32")
    assert "| talos | not measured | not measured | 0.30 (0.44) | 0.33 (0.72) | not measured | 0.33 (0.72) |" in block


def test_graph_breaks_are_shown_of_what_is_compiled():
    lines = render.markdown([table()]).splitlines()
    assert [line.endswith("| 0 |") for line in lines if line.startswith("| talos | 1350.0 ms")] == [False, True]


def test_aims_name_what_is_missed_and_what_is_not_measured():
    name, reached, *elsewhere = aims([table()], MODELS)[1]
    assert (name, reached) == ("CPU: iteration, both eager", "0.60 (≤ 0.75)")
    assert elsewhere == ["not measured (≤ 0.75)", "not measured (no aim)"]
    assert aims([table(talos=0.9)], MODELS)[1][1] == "0.90 (≤ 0.75, missed)"
    gpu = {name: reached for name, reached, *_ in aims([table("cuda")], MODELS)}
    assert gpu["CPU: iteration, both eager"] == "not measured (≤ 0.75)"
    assert gpu["GPU: iteration, eager over the paper variant"] == "0.30 (≤ 0.40)"
    assert gpu["GPU: step over fused AdamW's"] == "0.60 (≤ 0.20, missed)"


def test_the_plot_has_every_row_but_the_baselines_and_knows_which_were_alone():
    found = {(point.method, point.variant): point for point in points(table())}
    assert found.keys() == {("linearized", "eager"), ("talos", "eager"), ("talos", "compiled")}
    assert {key for key, point in found.items() if point.alone} == {("linearized", "eager")}
    talos = found["talos", "eager"]
    assert (talos.time, talos.memory) == pytest.approx((0.6, 0.5))
