"""benchmarks/gpu.sh on a machine of stubs: what it runs, that one part's failure stops no other, and what it says."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

# Stands for the Python with torch. The libraries are there once pip has run; one benchmark fails, one hangs.
PYTHON = """#!/bin/sh
case "$*" in
  *is_available*) exit {cuda} ;;
  *ops.backend*) test -e "{folder}/built" ;;
  *"pip install"*--target*) echo "installs $*" ;;
  *"pip install"*) echo "installs $*"; {install} ;;
  *step.py*) echo boom; exit 3 ;;
  *calibration.py*T5-Large*) trap "echo interrupted; exit 1" INT; sleep 60 ;;
  *pytest*) echo "ran $*" ;;
esac
"""


@pytest.fixture
def run(tmp_path: Path):
    def script(*parts: str, cuda: int = 0, install: str | None = None, **variables: str):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        install = f'touch "{tmp_path}/built"' if install is None else install
        for name, text in (
            ("python", PYTHON.format(cuda=cuda, folder=tmp_path, install=install)),
            ("compute-sanitizer", '#!/bin/sh\necho "sanitizer $2"\n'),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "OUT": str(tmp_path / "out"),
            "LIMIT": "3", "MODELS": "ViT-B-32 T5-Large", **variables,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / "benchmarks" / "gpu.sh", *parts],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        summary = tmp_path / "out" / "summary.txt"
        return done, summary.read_text().splitlines() if summary.exists() else []

    return script


def test_every_part_runs_whatever_became_of_the_others(run, tmp_path):
    done, summary = run(OPTIONS="--methods talos")
    assert done.returncode == 1
    results = {line.split(":")[0]: line.split(": ")[1].split(",")[0] for line in summary}
    assert list(results) == [
        "build", "tests", "compiled", "sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-synccheck",
        "step-ViT-B-32", "step-T5-Large", "kernels", "calibration-ViT-B-32", "calibration-T5-Large",
        "table-ViT-B-32", "table-T5-Large",
    ]  # fmt: skip
    assert results.pop("step-ViT-B-32") == "FAILED with exit code 3; see step-ViT-B-32.txt"
    assert results.pop("step-T5-Large") == "FAILED with exit code 3; see step-T5-Large.txt"
    assert results.pop("calibration-T5-Large") == "STOPPED after 3 s; see calibration-T5-Large.txt"
    assert set(results.values()) == {"passed"}
    assert "interrupted" in (tmp_path / "out" / "calibration-T5-Large.txt").read_text()
    log = (tmp_path / "out" / "table-T5-Large.txt").read_text()
    assert "--benchmark --preset gpu" in log and "--methods talos" in log and "--models T5-Large" in log
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        held = {Path(name).name for name in archive.getnames()}
    assert {"summary.txt", "machine.txt", "table-T5-Large.txt"} <= held


def test_nothing_runs_longer_than_the_budget(run):
    done, summary = run("build", "calibration", "kernels", "table", MODELS="T5-Large", LIMIT="30", BUDGET="4")
    assert done.returncode == 1
    assert [line.split(":")[0] for line in summary] == ["build", "calibration-T5-Large", "kernels", "table-T5-Large"]
    assert re.search("STOPPED after [1-4] s", summary[1])
    assert all(line.endswith("NOT RUN, the 4 s for all of it are over") for line in summary[2:])


def test_a_part_on_its_own_builds_first_where_that_is_needed(run, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "open_clip_torch-3-py3-none-any.whl").touch()
    done, summary = run("tests", WHEELS=str(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in summary] == ["wheels", "build", "tests"]
    assert "open_clip_torch-3" in (tmp_path / "out" / "wheels.txt").read_text()
    _, summary = run("tests")
    assert [line.split(":")[0] for line in summary] == ["tests"]
    _, summary = run("tests", WHEELS=str(wheels))  # that came later than the libraries
    assert [line.split(":")[0] for line in summary] == ["wheels", "tests"]


def test_a_relative_python_is_that_of_the_repository_s_root(run, tmp_path):
    """The libraries are looked for from outside the checkout, where a relative path leads nowhere."""
    _, summary = run("step", PYTHON=os.path.relpath(tmp_path / "bin" / "python", ROOT), MODELS="T5-Large")
    said = [line.split(",")[0].split(";")[0] for line in summary]
    assert said == ["build: passed", "step-T5-Large: FAILED with exit code 3"]


def test_without_models_other_libraries_are_calibrated_too(run):
    _, summary = run("calibration", MODELS="", LIMIT="1")
    assert [line.split(":")[0] for line in summary] == [
        "build", "calibration-ViT-B-32", "calibration-ViT-B-32-timm", "calibration-ViT-L-14", "calibration-T5-Large",
    ]  # fmt: skip


def test_make_takes_the_python_of_the_user_s_path(tmp_path):
    """And not that of .venv, which has no reason to know a GPU."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu.sh").write_text('echo "$PATH"')
    made = subprocess.run(["make", "--silent", "gpu"], cwd=tmp_path, capture_output=True, text=True)
    assert made.stdout.strip() == os.environ["PATH"], made.stderr


def test_the_sanitizer_is_told_of_every_kernel():
    listed = re.search(r"local ours=\((.*)\)", (ROOT / "benchmarks" / "gpu.sh").read_text())[1].split()
    cuda = "".join(file.read_text() for file in (ROOT / "csrc").glob("*.cu"))
    triton = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    kernels = re.findall(r"__global__ void(?: __launch_bounds__\([^)]*\))?\s+(\w+)\(", cuda)
    kernels += re.findall(
        r"@triton\.jit(?:\([^@]*?\))?\ndef ([a-z]\w*)\(", triton
    )  # with an underscore: called by those
    assert sorted(listed) == sorted(kernels) and len(kernels) >= 7


def test_nothing_is_measured_without_the_libraries(run):
    done, summary = run(install="exit 1")
    assert done.returncode == 1
    assert summary == ["build: FAILED with exit code 1; see build.txt"]
    done, summary = run(install="true")
    assert done.returncode == 1
    assert "no CUDA operators" in summary[-1]


@pytest.mark.parametrize(
    ("parts", "cuda", "python", "message"),
    [
        ((), 1, {}, "CUDA device"),
        (("tests", "all"), 0, {}, "no part all"),
        ((), 0, {"PYTHON": "no/python"}, "there is no no/python"),
    ],
)
def test_refusals(run, parts, cuda, python, message):
    done, summary = run(*parts, cuda=cuda, **python)
    assert done.returncode == 2
    assert message in done.stderr
    assert not summary
