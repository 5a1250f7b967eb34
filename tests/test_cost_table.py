"""How the cost table is shown: ratios, spread, memory, aims, and what the README says of them."""

import json
import sys
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import render
import show
from aims import aims
from efficiency import points

RESULTS = ROOT / "benchmarks" / "results"
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


def section(title: str, page: str = "README.md") -> str:
    """Of a page, its lines joined."""
    _, _, rest = (ROOT / page).read_text().partition(f"## {title}\n")
    return " ".join(rest.partition("\n## ")[0].split())


def test_the_readme_shows_the_committed_summary():
    assert (RESULTS / "summary.md").read_text() in (ROOT / "README.md").read_text()


def test_the_readme_says_of_memory_and_compiling_what_was_measured():
    contents = {content["model"]: content for content in render.load(RESULTS)}
    above = [show.short(contents[model], "talos", "eager", "above the model") for model in MODELS]
    assert "`talos` adds to the model {}, {} and {} of".format(*above) in section("What it costs")
    taken = {}
    for method in ("nonlinear", "talos"):
        for variant in ("eager", "compiled"):
            cells = show.cells(contents["ViT-B-32"], show.row_of(contents["ViT-B-32"], method, variant))
            taken[method, variant] = show.measured("total", cells["total"]).removesuffix(" ms")
    for method, words in (("nonlinear", "took {} ms instead of {},"), ("talos", "`talos` {} instead of {} ")):
        assert words.format(taken[method, "compiled"], taken[method, "eager"]) in section("What it costs")


def test_the_pages_say_of_the_step_what_was_measured():
    rows = {model: json.loads((RESULTS / f"step_{model}_cpu.json").read_text())["rows"] for model in MODELS}
    assert {len({row["rounds"] for row in rows[model].values()}) for model in MODELS} == {1}
    page = section("The optimizer's step", "benchmarks/README.md")
    for name, digits in (("TaLoS mask", 2), ("TaLoS mask, clip + step", 2), ("LoTA-like 10 %", 2), ("10 % random", 2)):
        found = [rows[model][f"MaskedAdam, {name}"] for model in MODELS]
        shown = [f"{row['of_fused']:.{digits}f} [{row['of_fused_min']:.{digits}f}–{row['of_fused_max']:.{digits}f}]"
                 for row in found]  # fmt: skip
        assert f"| {' | '.join(shown)} |" in page
    dense = [rows[model]["dense masked AdamW, TaLoS mask"] for model in MODELS]
    assert f"| {dense[-1]['of_fused']:.1f}* |" in page and not dense[-1]["interleaved"]
    ours = [f"{rows[model]['MaskedAdam, TaLoS mask']['of_fused']:.2f}" for model in MODELS]
    low, high = (f"{choose(row['of_fused'] for row in dense):.1f}" for choose in (min, max))
    said = section("What it costs")
    assert "alone takes {}, {} and {} of".format(*ours) in said and f"takes {low} to {high} times" in said
    contents = {content["model"]: content for content in render.load(RESULTS)}
    released = [show.cells(contents[m], show.row_of(contents[m], "talos", "paper"))["step"].times for m in MODELS]
    assert "that takes {}, {} and {} of the foreach AdamW".format(*released) in page


def test_the_pages_say_of_calibration_what_was_measured():
    def of_plain(model: str, group: str, way: str, digits: int = 1) -> str:
        content = json.loads((RESULTS / f"calibration_{model}_cpu.json").read_text())
        assert content[group]["revision"].isalnum()  # of a clean commit
        return f"{content[group]['rows'][way]['of_plain']:.{digits}f}"

    full, bf16 = (of_plain("ViT-B-32", "ours, batch 16", f"talos-fast, {kind}", 2) for kind in ("full", "bf16"))
    peers = [of_plain("ViT-B-32-timm", "peers, batch 8", way)
             for way in ("BackPACK, no norms", "vmap(grad), 4 at a time", "Opacus")]  # fmt: skip
    released = [of_plain("ViT-B-32", f"released, batch {size}", "as released") for size in (4, 8, 16)]
    said, page = section("What it costs"), section("Calibration", "benchmarks/README.md")
    assert f"takes {full} times a plain" in said and f"; {bf16} with" in said
    assert "BackPACK takes {}, `vmap(grad)` {}, Opacus {}, the".format(*peers) in said
    assert f"{full}, or {bf16} with" in page and "takes {}, `vmap(grad)` {} and Opacus {} (".format(*peers) in page
    for text in (said, page):
        assert "procedure {}, {} and {} at batches of 4, 8 and 16".format(*released) in text
