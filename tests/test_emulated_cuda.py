"""The GPU tests on a CUDA device that is emulated on the CPU (emulated_cuda/), as a process of its own.

It runs what the host does for a GPU, with torch's own allocator, streams, autograd threads and graphs, and our kernels'
sources, and the kernels that torch.compile writes; work runs as late as CUDA allows. It shows no speed, and nothing of
torch's own kernels.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HAS_GPU, ROOT

# Node ids or their beginnings -> why they are left to a real GPU.
LEFT_OUT = {
    "tests/test_training.py": "200 steps of a whole model in Triton's interpreter",
    "tests/test_ops.py::test_the_cuda_kernel_equals_the_reference[(8, 50, 3072, 768)": "minutes a shape",
    "tests/test_ops.py::test_the_cuda_kernel_equals_the_reference[(4, 257, 1024, 1024)": "minutes a shape",
    **{
        f"tests/test_whole_step.py::test_a_compiled_step_is_captured_too[{case}": "a minute or two a case"
        for case in ("clip-l", "clip-nonlinear", "clip-talos-True", "timm", "bert", "t5")
    },
    **{
        "tests/test_whole_step.py::test_a_replayed_step_with_checkpoints_and_two_batches_is_the_plain_one"
        f"[{case}": "the steps of CLIP and [t5-talos] again"
        for case in ("timm", "bert", "t5-l", "t5-nonlinear")
    },
    "tests/test_end_to_end.py::test_every_method_adds_and_forgets[cuda-lota]": "the steps of [cuda-talos] again",
    "tests/test_masked_adam.py::test_low_precision_steps_in_fp32[cuda-dtype0]": "the interpreter truncates",
    "tests/test_backends.py": "they start a Python of their own, in which nothing is emulated",
}
DESELECTED = [f"--deselect={node}" for node in LEFT_OUT]
OF_KERNELS = [f"tests/test_{name}.py" for name in ("ops", "threshold", "compact_operator", "masked_adam")]
pytestmark = [
    pytest.mark.skipif(HAS_GPU, reason="there is a GPU here for them"),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA, so nothing can be emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulated device"),
    pytest.mark.timeout(1200),
]


def run(*arguments: str, **environment: str) -> int:
    """Tests that pass on the emulated device, where none may fail."""
    command = [sys.executable, ROOT / "tests" / "emulated_cuda" / "run.py", "-m", "pytest", "-p", "plugin", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_device_is_as_strict_as_a_gpu():
    assert run("tests/emulated_cuda/check_device.py") == 15


def test_gpu_tests_of_the_kernels_pass_and_no_kernel_leaves_its_tensors():
    """Without torch's caching allocator every tensor is a block of its own, and behind a block there is nothing."""
    checks = "tests/emulated_cuda/check_memory.py"
    assert run(checks, *OF_KERNELS, "-m", "gpu", *DESELECTED, PYTORCH_NO_CUDA_MEMORY_CACHING="1") > 150


def test_all_other_gpu_tests_pass():
    assert run("tests", "-m", "gpu", *DESELECTED, *(f"--ignore={file}" for file in OF_KERNELS)) > 90


def test_the_table_of_costs_is_measured_as_on_a_gpu(tmp_path):
    """Of a tiny model: every row of it was timed by events, and its peak read from torch's allocator."""
    small = ("--models", "smoke", "--batch", "4", "--rounds", "1", "--methods", "talos,l-lora")
    variants = ("--variants", "paper,eager")
    run("benchmarks/table.py", "--benchmark", "--preset", "gpu", "--results", str(tmp_path), *small, *variants)
    (file,) = tmp_path.glob("table_smoke*.json")
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 6 and found["bf16"]
    for row in found["rows"]:
        assert row["peak_bytes"] > 0 and all(seconds[0] > 0 for seconds in row["seconds"].values()), row
