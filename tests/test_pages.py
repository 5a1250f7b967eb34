"""What README.md and benchmarks/README.md say was measured is what the committed files hold."""

import json
import re
import sys
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import render
import show

RESULTS = ROOT / "benchmarks" / "results"
MODELS = render.MODELS


def section(title: str, page: str = "README.md") -> str:
    """Of a page, its lines joined."""
    _, _, rest = (ROOT / page).read_text().partition(f"## {title}\n")
    return " ".join(rest.partition("\n## ")[0].split())


def result(name: str) -> Any:
    """A committed file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_readme_shows_the_committed_summary():
    assert (RESULTS / "summary.md").read_text() in (ROOT / "README.md").read_text()


def test_memory_and_compiling():
    contents = {content["model"]: content for content in render.load(RESULTS)}
    above = [show.short(contents[model], "talos", "eager", "above the model") for model in MODELS]
    assert "`talos` adds to the model {}, {} and {} of".format(*above) in section("What it costs")
    taken = {}
    for method in ("nonlinear", "talos"):
        for variant in ("eager", "compiled"):
            cells = show.cells(contents["ViT-B-32"], show.row_of(contents["ViT-B-32"], method, variant))
            taken[method, variant] = show.measured("total", cells["total"]).removesuffix(" ms")
    for method, words in (("nonlinear", "took {} ms instead of {},"), ("talos", "`talos` {} instead of {}.")):
        assert words.format(taken[method, "compiled"], taken[method, "eager"]) in section("What it costs")


def test_the_backward_pass():
    rows = result("backward_time_ViT-B-32_cpu")["rows"]
    part, whole = (f"{rows[name]['median_ms']:.0f}" for name in ("selected tensors", "all parameters"))
    assert f"ViT-B/32 take {part} ms instead of {whole} " in section("What it costs")
    assert rows["selected rows, compacted"]["of_selected_tensors"] > 0.95  # so the page says: not time


def step_rows(name: str) -> list[dict[str, Any]]:
    """Of each model, over fused AdamW."""
    return [result(f"step_{model}_cpu")["rows"][name] for model in MODELS]


def spread(row: dict[str, Any], digits: int) -> str:
    """A median and its range, as the table of steps has it; a star where it was not measured in turn."""
    median = f"{row['of_fused']:.{digits}f}"
    if not row["interleaved"]:
        return f"{median}*"
    return f"{median} [{row['of_fused_min']:.{digits}f}–{row['of_fused_max']:.{digits}f}]"


def test_the_optimizers_step():
    page, said = section("The optimizer's step", "benchmarks/README.md"), section("What it costs")
    sparse = ["TaLoS mask", "TaLoS mask, clip + step", "LoTA-like 10 %", "10 % random"]
    for name, digits in {**{f"MaskedAdam, {name}": 2 for name in sparse}, "dense masked AdamW, TaLoS mask": 1}.items():
        rows = step_rows(name)
        assert {row["rounds"] for row in rows if row["interleaved"]} == {12}
        assert f"| {' | '.join(spread(row, digits) for row in rows)} |" in page
    ours, dense = (
        [row["of_fused"] for row in step_rows(name)]
        for name in ("MaskedAdam, TaLoS mask", "dense masked AdamW, TaLoS mask")
    )
    assert "alone takes {:.2f}, {:.2f} and {:.2f} of".format(*ours) in said
    assert f"takes {min(dense):.1f} to {max(dense):.1f} times" in said
    contents = {content["model"]: content for content in render.load(RESULTS)}
    released = [show.cells(contents[m], show.row_of(contents[m], "talos", "paper"))["step"].times for m in MODELS]
    assert "its step takes {}, {} and {} of the foreach AdamW".format(*released) in page


def of_plain(model: str, group: str, way: str = "talos-fast, full", digits: int = 2, key: str = "of_plain") -> str:
    """What a way of calibration takes over a plain pass."""
    content = result(f"calibration_{model}_cpu")[group]
    assert re.fullmatch("[0-9a-f]{12}", content["revision"])  # of a clean commit
    return f"{content['rows'][way][key]:.{digits}f}"


def test_calibration():
    said, page = section("What it costs"), section("Calibration", "benchmarks/README.md")
    full, bf16 = (of_plain("ViT-B-32", "ours, batch 16", f"talos-fast, {kind}") for kind in ("full", "bf16"))
    assert f"takes {full} times a plain" in said and f"; {bf16} with" in said
    bert, t5 = (of_plain(model, "ours, batch 16") for model in ("BERT-6", "T5-4-4"))
    assert f"{full}, or {bf16} with bf16 products; {bert} on a BERT of 6 layers, {t5} on a T5 of 4 and 4" in page
    base = [of_plain("ViT-B-32", f"released, batch {size}") for size in (8, 4)]
    large = [of_plain("ViT-L-14", f"ours, batch {size}") for size in (8, 2)]
    words = "{} at 8 and {} at 4 (ViT-B/32), {} at 8 and {} at 2 (ViT-L/14)"
    assert words.format(*base, *large) in page


def test_other_ways_to_calibrate():
    said, page = section("What it costs"), section("Calibration", "benchmarks/README.md")
    keys = "of_plain", "of_plain_min", "of_plain_max"
    beside = [of_plain("ViT-B-32-timm", "peers, batch 8", key=key) for key in keys]
    assert "ours took {} [{}–{}]".format(*beside) in page and f"ours took {beside[0]}," in said
    ways = "BackPACK, no norms", "vmap(grad), 4 at a time", "Opacus"
    peers = [of_plain("ViT-B-32-timm", "peers, batch 8", way, 1) for way in ways]
    assert (
        "BackPACK takes {} (without the norms, for which it has no rule), `vmap(grad)` {}, Opacus {};".format(*peers)
        in said
    )
    assert "takes {}, `vmap(grad)` {} and Opacus {};".format(*peers) in page
    released = [of_plain("ViT-B-32", f"released, batch {size}", "as released", 1) for size in (4, 8, 16)]
    assert "procedure {}, {} and {} at batches of 4, 8 and 16".format(*released) in said
    assert "procedure {}, {} and {} at batches of 4, 8 and 16".format(*released) in page


def test_memory_of_calibration():
    page, ranges = section("Calibration", "benchmarks/README.md"), {}
    for group in ("memory, batch", "memory with glibc's defaults, batch"):
        ratios = []
        for model, batch in (("ViT-B-32", 16), ("ViT-L-14", 4), ("BERT-6", 16), ("T5-4-4", 16)):
            rows = result(f"calibration_{model}_cpu")[f"{group} {batch}"]["rows"]
            plain = rows["plain forward-backward, gradients kept"]
            ratios.append(rows["talos-fast, full"]["peak_bytes"] / plain["peak_bytes"])
        ranges[group] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    ours, glibc = ranges.values()
    assert f"Peak memory is {ours} of that" in page and f"{glibc} with glibc's default" in page


def test_the_threshold():
    rows = result("threshold_cpu_1threads")["rows"]
    ours, torchs = (
        f"{rows[name]['median']:.1f}"
        for name in ("talos_fast.sensitivity.kth_smallest", "torch.kthvalue of all in one tensor")
    )
    said = f"The exact threshold takes {ours} s per 10⁸ scores, `torch.kthvalue` {torchs}."
    assert said in section("Calibration", "benchmarks/README.md")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*threads.json")), ids=lambda path: path.stem)
def test_files_name_the_threads_that_they_were_measured_with(path):
    assert path.stem.endswith(f"_{result(path.stem)['threads']}threads")
