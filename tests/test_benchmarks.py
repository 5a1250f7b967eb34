"""The cost table on tiny models, from the command to the picture; and that no benchmark runs unasked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import records
import show
import table
import workloads
from choice import Choice
from records import merge_rows
from rivals import DenseMaskedAdamW

from talos_fast import TalosError
from talos_fast.methods import METHODS
from talos_fast.profiling.work import Work


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)


BARE = "-p", "no:timeout"
REFUSED = """
import json, sys, pytest
for options in json.loads(sys.argv[1]):
    print("exit code", int(pytest.main(["benchmarks/step.py", "--benchmark", "-p", "no:cacheprovider", *options])))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("results")
    command = ("-m", "pytest", "benchmarks/table.py", "--benchmark", "--preset", "smoke", "--results", folder, "-sq")
    printed = ""
    # Without pytest-timeout the second, which asks for spaces in its list too.
    for options in ((), ("--models", "smoke-T5", "--methods", "talos, nonlinear", "--variants", "eager", *BARE)):
        done = program(*command, "-p", "no:cacheprovider", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return folder, printed


@pytest.mark.parametrize(
    ("model", "methods", "variants"),
    [("smoke", tuple(METHODS), ("paper", "eager")), ("smoke-T5", ("nonlinear", "talos"), ("eager",))],
)
def test_every_row_has_its_figures(measured, model, methods, variants):
    folder, printed = measured
    content = json.loads((folder / f"table_{model}_cpu.json").read_text())
    assert {"torch", "machine", "threads", "date", "inputs", "batch", "parameters", "device_name"} <= content.keys()
    rows = {(row["method"], row["variant"]): row for row in content["rows"]}
    assert rows.keys() == {(method, variant) for method in methods for variant in variants}
    for (method, variant), row in rows.items():
        assert "missing" not in row, row
        assert row["revision"] and set(row["baselines"]) >= {variant}
        assert all(len(times) == 2 and min(times) >= 0 for times in row["seconds"].values())
        assert f"{method}, {variant}" in printed
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        assert row["work"]["forward"] > 0 and min(row["work"].values()) >= 0, row
    full, sparse = rows["nonlinear", "eager"], rows["talos", "eager"]
    assert full["trained"] == content["parameters"] and sparse["trained"] == content["selected"]
    assert sparse["step_bytes"] < full["step_bytes"]
    work = sparse["work"]
    # Only a fused projection has rows without a selected entry.
    assert (work["selected_gradients"] < work["weight_gradients"]) == (model == "smoke")
    assert work["weight_gradients"] < full["work"]["weight_gradients"]
    assert sparse["work"]["saved_bytes"] < full["work"]["saved_bytes"]


def test_results_go_where_they_are_asked_to(tmp_path):
    """A GPU machine gives back one folder."""
    benchmarks = [f"benchmarks/{name}.py" for name in ("step", "calibration", "checkpointing")]
    options = "--preset", "smoke", "--groups", "ours", "--rounds", "1", "--results", tmp_path
    done = program("-m", "pytest", *benchmarks, "--benchmark", *options, "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "step_smoke_cpu.json").read_text())
    assert steps["rows"]["MaskedAdam, TaLoS mask"]["of_fused"] > 0 and steps["device_name"] and steps["revision"]
    calibration = json.loads((tmp_path / "calibration_smoke_cpu.json").read_text())
    assert calibration.keys() == {"benchmark", "model", "ours, batch 16"}
    ours = calibration["ours, batch 16"]
    assert ours["rows"]["talos-fast, full"]["of_plain"] > 0 and ours["device_name"] and ours["revision"]
    checkpointing = json.loads((tmp_path / "checkpointing_smoke_cpu.json").read_text())["rows"]
    mib = {name: row["allocated_mib"] for name, row in checkpointing.items()}
    assert len(mib) == 4 and mib["layers 1 to 1, as finetune runs it"] < mib["layers 1 to 1, as Hugging Face has it"]


def test_options_that_nothing_can_do_are_refused_before_anything_runs():
    refused = {
        "--models smoke,bogus": "--models 'bogus': choose among ViT-B-32, ViT-L-14, T5-Large, smoke, smoke-T5",
        "--methods bogus": "--methods 'bogus': choose among nonlinear",
        "--variants eager,": "--variants '': choose among paper, eager, compiled",
        "--batch 0": "--batch: 0 is below 1",
        "--batch -3": "--batch: -3 is below 1",
        "--rounds 0": "--rounds: 0 is below 1",
    }
    if not torch.cuda.is_available():
        refused["--preset gpu"] = "--preset gpu: torch sees no CUDA device"
        refused["--device cuda"] = "--device cuda: torch sees no CUDA device"
    options = [[*option.split(), *(() if "preset" in option else ("--preset", "smoke"))] for option in refused]
    done = program("-c", REFUSED, json.dumps(options))
    assert done.stdout.count("exit code 4") == len(refused), done.stdout + done.stderr
    for message in refused.values():
        assert message in done.stderr


def test_a_table_without_a_figure_does_not_read_as_passed(tmp_path, monkeypatch):
    chosen = Choice("smoke", torch.device("cpu"), ["talos"], ["eager"], None, 2, False)
    request = SimpleNamespace(config=SimpleNamespace(getoption=lambda _: tmp_path))

    def not_installed(*_):
        raise ModuleNotFoundError("No module named 'wcwidth'", name="wcwidth")

    monkeypatch.setattr(table, "choice", lambda _: chosen)
    monkeypatch.setattr(table, "bytes_needed", not_installed)
    with pytest.raises(TalosError, match="nothing was measured: wcwidth is not installed"):
        table.test_table("smoke", request)
    rows = json.loads((tmp_path / "table_smoke_cpu.json").read_text())["rows"]
    assert [row["missing"] for row in rows] == ["wcwidth is not installed"] * 2


def test_what_does_not_fit_beside_full_fine_tuning_is_measured_alone(monkeypatch):
    chosen = Choice("smoke", torch.device("cpu"), ["linearized", "l-lora"], ["eager"], None, 2, False)
    enough = workloads.bytes_needed("smoke", "linearized", "eager", baselines=0)
    assert workloads.bytes_needed("smoke", "l-lora", "eager", 1) <= enough
    assert enough < workloads.bytes_needed("smoke", "linearized", "eager", 1)
    monkeypatch.setattr(table, "bytes_free", lambda _: enough)
    measured = table.Table("smoke", chosen)
    rows = list(measured.measured())
    assert [row["method"] for row in rows] == ["nonlinear", "l-lora", "linearized"]
    full, beside, alone = rows
    assert not full["alone"] and not beside["alone"] and alone["alone"]
    assert full["baselines"] != beside["baselines"] == alone["baselines"]
    content = measured.content() | {"date": "today"}
    printed = show.text(content)
    assert show.ALONE in printed and show.cells(content, alone)["total"].times.endswith("*")
    assert not show.cells(content, beside)["total"].times.endswith("*")


def test_rendering(measured):
    folder, _ = measured
    done = program("benchmarks/render.py", "--results", folder)
    assert done.returncode == 0, done.stderr
    table = (folder / "table.md").read_text()
    assert "| talos |" in table and "| nonlinear |" in table
    content = json.loads((folder / "table_smoke_cpu.json").read_text())
    row = next(r for r in content["rows"] if (r["method"], r["variant"]) == ("talos", "eager"))
    compiled = {key: value for key, value in row.items() if key != "work"} | {"variant": "compiled"}
    assert show.counted(content, row) == show.counted(content, compiled)
    work = Work(**row["work"])
    flops, kept, moved = f"{work.done / 1e9:.3g} ({work.floor / 1e9:.3g})", work.saved_bytes, row["step_bytes"]
    assert f"| {flops} | {kept / 2**20:.1f} MiB | {moved / 2**20:.1f} MiB |  |" in table
    assert (folder / "efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_renderings_are_what_was_measured(tmp_path):
    results = ROOT / "benchmarks" / "results"
    for path in results.glob("table_*.json"):
        shutil.copy(path, tmp_path)
    done = program("benchmarks/render.py", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("table.md", "summary.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text()


def test_rendering_nothing_is_an_error(tmp_path):
    done = program("benchmarks/render.py", "--results", tmp_path)
    assert done.returncode == 2 and "no measured table" in done.stderr


def test_without_the_flag_benchmarks_are_skipped_for_that_reason():
    done = program("-m", "pytest", "benchmarks", "-rs", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "benchmarks run with --benchmark" in done.stdout
    assert "table.py" in done.stdout and "step.py" in done.stdout and "passed" not in done.stdout


def test_the_dense_masked_rival_is_adamw_on_what_is_selected():
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64)) for _ in range(2))
    score = (torch.arange(20) % 3 == 0).double()
    rival = DenseMaskedAdamW([p], {p: score}, lr=1e-2, weight_decay=0.1)
    adamw = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    start = p.detach().clone()
    for number in range(5):
        p.grad = torch.sin(p.detach() * 3 + number)
        q.grad = torch.where(score.bool(), p.grad, torch.sin(q.detach() * 3 + number))
        rival.step()
        adamw.step()
    selected = score.bool()
    torch.testing.assert_close(p[selected], q[selected], rtol=1e-12, atol=1e-14)
    assert torch.equal(p[~selected], start[~selected])


def test_rows_of_the_same_machine_are_kept_and_failures_undo_nothing(tmp_path):
    path = tmp_path / "table.json"

    def content(*rows, torch_version="2"):
        return {"model": "m", "torch": torch_version, "date": "today", "rows": list(rows)}

    old = {"method": "talos", "variant": "eager", "seconds": 1}
    path.write_text(json.dumps(content(old, {"method": "lota", "variant": "eager", "seconds": 1})))
    new = {"method": "lota", "variant": "eager", "seconds": 2}
    assert merge_rows(path, content(new))["rows"] == [old, new]
    failed = {"method": "talos", "variant": "eager", "missing": "out of memory"}
    assert old in merge_rows(path, content(failed))["rows"]
    assert merge_rows(tmp_path / "none.json", content(new))["rows"] == [new]
    with pytest.raises(TalosError, match=r"table.json .*\(torch 2 there, 3 here\): take another --results, or delete"):
        merge_rows(path, content(new, torch_version="3"))


def test_the_preset_measures_the_batches_that_are_committed():
    for path in (ROOT / "benchmarks" / "results").glob("table_*_cpu.json"):
        committed = json.loads(path.read_text())
        assert workloads.SPECS[committed["model"]].cpu_batch == committed["batch"], path


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        identity = "-c", "user.name=n", "-c", "user.email=e"
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    result, code = tmp_path / "benchmarks" / "results" / "table.json", tmp_path / "setup.py"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "benchmarks" / "records.py"))
    monkeypatch.setenv("TALOS_REVISION", "given")
    result.parent.mkdir(parents=True)
    assert records.revision() == "given"
    for path in (result, code):
        path.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    result.write_text("measured")
    clean = records.revision()
    assert len(clean) == 12 and "+" not in clean
    code.write_text("changed")
    assert records.revision() == clean + "+"
