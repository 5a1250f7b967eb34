import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import abi
import pytest

TOOLS = [tool for tool in ("nm", "c++filt", "readelf") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"binutils are missing: {TOOLS}")


def library(name):
    spec = importlib.util.find_spec(f"talos_fast.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"talos_fast.{name} is not built here")
    return Path(spec.origin)


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_one_binary_for_every_torch_from_the_target_on(name):
    assert abi.breaches(library(name)) == []


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_one_binary_for_every_python(name):
    path = library(name)
    assert ".abi3." in path.name
    private = [s for s in abi.imported_symbols(path) if s.startswith("_Py") and not s.startswith("_Py_")]
    assert private == []


def cuobjdump():
    """NVIDIA's reader of GPU code: of the toolkit, else the one that Triton brings."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/cuobjdump"
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None or triton.origin is None else [Path(triton.origin).parent]
    bundled = [folder / "backends/nvidia/bin/cuobjdump" for folder in folders]
    found = [shutil.which("cuobjdump"), *(str(path) for path in (home, *bundled) if path.is_file())]
    return next((path for path in found if path), None)


def test_gpu_code_keeps_everything_in_registers():
    if (tool := cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    said = abi.output(tool, "-res-usage", str(library("_C_cuda")))
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    # Spilled registers lie in the stack frame.
    assert [name for name, _, stack, local in kernels if (stack, local) != ("0", "0")] == []
    architectures = set(re.findall(r"arch = (sm_\d+)", said))
    tensor_core = [name for name, *_ in kernels if "accumulate_mma" in name]
    assert len(tensor_core) == 3 * len(architectures) > 0  # bfloat16, float16, fp32


def test_the_check_knows_shims_and_their_versions():
    versions = abi.shim_versions()
    assert versions["torch_parallel_for"] == (2, 10)
    assert max(versions.values()) >= abi.TARGET


def test_the_check_reports_a_plain_extension(tmp_path):
    source, built = tmp_path / "plain.cpp", tmp_path / "plain.so"
    source.write_text("namespace at { void manual_seed(); } void f() { at::manual_seed(); }")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    assert abi.breaches(built) == ["plain.so: C++ symbol at::manual_seed()"]
