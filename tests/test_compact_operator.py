"""compact_gradient_: the C++ operator and the Triton kernel against the plain reference, and the compiled kernel."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch

from talos_fast import ops
from talos_fast.optim.compact_operator import compact_gradient_reference, gather_selected
from talos_fast.optim.selection import select

pytestmark = pytest.mark.usefixtures("two_threads")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS = {
    "all": torch.ones(65_537, dtype=torch.bool),
    "stripes": torch.arange(70_000) // 300 % 2 == 0,
    "bits": torch.rand(70_000, generator=torch.Generator().manual_seed(0)) < 0.4,
    "offsets": torch.rand(200_000, generator=torch.Generator().manual_seed(1)) < 0.03,
    "edge": torch.arange(1025) % 3 == 0,
    "scalar": torch.tensor(True),
    "empty": torch.zeros(50, dtype=torch.bool),
}


def problem(mask: torch.Tensor, dtype: torch.dtype = torch.float32):
    grad = torch.randn(mask.shape).to(dtype)
    selection = select(mask, grad)
    compact = torch.randn(selection.count).to(torch.promote_types(dtype, torch.float32))
    return compact, grad, selection.work, selection.index


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_the_operator(name, dtype, accumulate):
    compact, grad, *index = problem(MASKS[name], dtype)
    want = grad[MASKS[name]].to(compact.dtype) + (compact if accumulate else 0)
    reference = compact.clone()
    if not accumulate:
        compact.fill_(float("nan"))
    torch.ops.talos_fast.compact_gradient_(compact, grad, *index, accumulate=accumulate)
    compact_gradient_reference(reference, grad, *index, accumulate=accumulate)
    assert torch.equal(compact, want) and torch.equal(reference, want)


def test_any_layout_is_gathered_in_memory_order():
    weight = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 6, 3, 3) < 0.5
    selection, grad = select(mask, weight), torch.randn(4, 6, 3, 3)
    want = grad.permute(0, 2, 3, 1)[mask.permute(0, 2, 3, 1)]
    assert torch.equal(gather_selected(grad, selection), want)
    assert torch.equal(gather_selected(grad, selection, into=want.clone()), 2 * want)


@pytest.mark.parametrize("name", ["bits"])
def test_opcheck(name):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    torch.library.opcheck(
        torch.ops.talos_fast.compact_gradient_.default, problem(MASKS[name][:3000]), {"accumulate": True}
    )


SPOILED = {
    "grad must be float32": lambda a: [a[0], a[1].int(), *a[2:]],
    "compact must be float64 for float64 gradients": lambda a: [a[0], a[1].double(), *a[2:]],
    "compact and grad must be contiguous": lambda a: [a[0], torch.randn(6000)[::2], *a[2:]],
    "and grad must be contiguous": lambda a: [a[0].repeat_interleave(2)[::2], *a[1:]],
    "four columns": lambda a: [*a[:2], a[2][:, :3].contiguous(), a[3]],
    "index must be uint8": lambda a: [*a[:3], a[3].float()],
    "row 0 of work leaves the parameter": lambda a: [*a[:2], a[2] + 4096, a[3]],
    "work covers [0-9]+ entries, compact has": lambda a: [torch.cat([a[0], a[0]]), *a[1:]],
}


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("text", SPOILED)
def test_the_operator_refuses_stray_memory(text):
    arguments = problem(MASKS["bits"][:3000])
    with pytest.raises(RuntimeError, match=text):
        torch.ops.talos_fast.compact_gradient_(*SPOILED[text](arguments), accumulate=False)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["stripes", "bits", "offsets", "edge", "scalar", "empty"])
def test_the_triton_kernel(name, dtype, accumulate, device):
    pytest.importorskip("triton")
    from talos_fast.kernels.compact import launch

    mask = MASKS[name] if MASKS[name].dim() == 0 else MASKS[name][-70_000:]  # offsets beyond 32,767
    compact, grad, work, index = problem(mask, dtype)
    moved = [None if t is None else t.to(device) for t in (compact, grad, work, index)]
    want = grad[mask].to(compact.dtype) + (compact if accumulate else 0)
    launch(*moved, accumulate=accumulate)
    assert torch.equal(moved[0].cpu(), want)


def compile_ahead_of_time() -> None:
    """Prints, for every architecture and variant, its layout conversions and what its cubin takes; needs no GPU."""
    from talos_fast.kernels.compact import BLOCK, compact_gradient
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    reader = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    for (encoding, index), (grad, arch) in product(
        enumerate(["*i64", "*u8", "*i16"]), [("*fp32", 80), ("*fp32", 90), ("*bf16", 90), ("*fp32", 100)]
    ):
        constants = {"ENCODING": encoding, "ACCUMULATE": True, "BLOCK": BLOCK}
        types = {"compact_ptr": "*fp32", "grad_ptr": grad, "work_ptr": "*i64", "index_ptr": index}
        source = ASTSource(compact_gradient, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
        kernel = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            said = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        print(json.dumps({"conversions": kernel.asm["ttgir"].count("convert_layout"), **used}))


def test_the_compiled_kernel():
    pytest.importorskip("triton")
    code = "import test_compact_operator as test; test.compile_ahead_of_time()"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel["conversions"] == kernel["STACK"] == kernel["LOCAL"] == 0
        assert kernel["REG"] <= 40
