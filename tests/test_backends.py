"""Which code computes: every instruction set, and plain torch, announced once, where a library is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from talos_fast import ops


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


PARITY = """
import importlib.util, sys, torch
{hide}
from talos_fast import ops
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    inputs, grads = torch.randn(3, 21, 300, dtype=dtype), torch.randn(3, 21, 101, dtype=dtype)
    scores = torch.zeros(101, 300, dtype=torch.promote_types(dtype, torch.float32))
    want = torch.einsum("nto,nti->noi", grads.double(), inputs.double()).square().sum(0)
    for _ in range(2):
        torch.ops.talos_fast.accumulate_squared_per_sample_(scores.zero_(), inputs, grads)
        torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-3)
from talos_fast.optim.adam_operator import masked_adam_reference
from talos_fast.optim.selection import select
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for density in (0.3, 0.02, 1):
        param, mask = torch.randn(5000, dtype=dtype), torch.rand(5000) < density
        selection, wide = select(mask, param), torch.promote_types(dtype, torch.float32)
        ours = [[param], [torch.randn(5000, dtype=dtype)], *torch.rand(3, 1, selection.count, dtype=wide).unbind(),
                [param[mask].to(wide)] if wide != dtype else [], [selection.work], [selection.index]]
        ours[2:5] = [list(moments) for moments in ours[2:5]]
        theirs = [[t if t is None else t.clone() for t in column] for column in ours]
        scalars = dict(decay=0.999, beta1=0.9, beta2=0.99, step_size=1e-2, correction=0.3, eps=1e-8, grad_scale=2.0)
        scalars |= dict(steps=[torch.zeros(())], step=1.0, maximize=True)
        torch.ops.talos_fast.masked_adam_(*ours, **scalars)
        masked_adam_reference(*theirs, **scalars)
        for (got,), (want,) in zip(ours[:5], theirs[:5]):
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=eps)
if {opcheck} and importlib.util.find_spec("expecttest"):
    torch.library.opcheck(torch.ops.talos_fast.accumulate_squared_per_sample_.default, (scores, inputs, grads))
print(ops.backend("cpu"), ops.backend("cuda"))
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_agrees(capability):
    run_python(PARITY.format(hide="", opcheck=False), ATEN_CPU_CAPABILITY=capability)


STRAY_BITS = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_selection import test_bits_without_entries_move_nothing_beyond_the_moments as check
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    check(dtype)
"""


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bits_without_entries_move_nothing_in_narrower_instruction_sets_either(capability):
    run_python(STRAY_BITS.format(folder=str(Path(__file__).parent)), ATEN_CPU_CAPABILITY=capability)


def test_without_the_libraries_torch_computes_and_says_so_once():
    result = run_python(PARITY.format(hide="sys.modules['talos_fast._C'] = None", opcheck=True))
    assert result.stdout.split() == ["torch", "torch"]
    assert result.stderr.count("computes in plain torch on cpu") == 1
    assert "a C++ compiler" in result.stderr


def test_without_the_cuda_library_the_cpu_one_still_works():
    result = run_python(PARITY.format(hide="sys.modules['talos_fast._C_cuda'] = None", opcheck=False))
    assert result.stdout.split()[1] == "torch"
    assert "plain torch" not in result.stderr or ops.backend("cpu") == "torch"


@pytest.mark.gpu
def test_without_the_cuda_library_cuda_tensors_get_torch_and_it_is_said_once():
    code = PARITY.format(
        hide="sys.modules['talos_fast._C_cuda'] = None; torch.set_default_device('cuda')", opcheck=True
    )
    result = run_python(code)
    assert result.stderr.count("computes in plain torch on cuda") == 1
    assert "nvcc" in result.stderr


def test_a_device_without_a_library_gets_torch():
    assert ops.backend("meta") == "torch"
