"""The kernels of MaskedAdam alone: what they compile to, and every edge of blocks and tiles in the interpreter.

What they compile to is read from code made ahead of time for three GPUs: no GPU is needed, and no kernel runs.
"""

import importlib.util
import re
import subprocess

import pytest
import torch
from adam_cases import CLOSE_ON, assert_stepped_by, assert_unselected_equal, device_of, launches, on_cpu, run
from conftest import ROOT
from torch.optim import AdamW

from talos_fast import MaskedAdam
from talos_fast.optim.selection import BLOCK, select
from talos_fast.optim.tables import word_ranks

triton = pytest.importorskip("triton")
BACKEND = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
ARCHITECTURES = (80, 90, 100)
# Type of parameter, gradient, state; master, amsgrad, scaled; most registers a thread: with 64 four programs share a
# multiprocessor's 65,536, with 80 three.
VARIANTS = {
    "fp32": (("float32", "float32", "float32"), (False, False, False), 64),
    "fp32, everything": (("float32", "float32", "float32"), (False, True, True), 80),
    "bf16": (("bfloat16", "bfloat16", "float32"), (True, False, False), 80),
    "fp16, everything": (("float16", "float16", "float32"), (True, True, True), 80),
    "bf16, compact gradient": (("bfloat16", "float32", "float32"), (True, False, False), 80),
    "bf16, dense": (("bfloat16", "bfloat16", "bfloat16"), (False, False, False), 64),
}

TL = triton.language
# As imported, before any test runs: for a kernel that calls tl.cumsum, as the one that compacts gradients, Triton's
# interpreter patches this module too, and leaves it so.
CORE = dict(vars(TL.core))


@pytest.fixture(scope="module")
def kernels():
    """A second copy of the module, compiled where the package's own is interpreted."""
    vars(TL.core).update(CORE)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    spec = importlib.util.spec_from_file_location("compiled_masked_adam", ROOT / "kernels" / "masked_adam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def specialized(kernel, architecture: int, arguments, options):
    """What a launch with these arguments would compile: its signature, constants and alignments."""
    backend = BACKEND(triton.backends.compiler.GPUTarget("cuda", architecture, 32))
    create = importlib.import_module("triton.runtime.jit").create_function_from_signature
    bound, specialization, _ = create(kernel.signature, kernel.params, backend)(*arguments, **options)
    names = list(bound)
    signature = {name: kind for name, (kind, _) in zip(names, specialization, strict=True)}
    constants = {name: bound[name] for name in names if signature[name] == "constexpr"}
    attributes = {(n,): backend.parse_attr(key) for n, (kind, key) in enumerate(specialization) if isinstance(key, str)}
    return signature, constants, attributes


def compile_for(kernel, architecture: int, arguments, options, warps: int):
    source = triton.compiler.ASTSource(kernel, *specialized(kernel, architecture, arguments, options))
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def resources(compiled, folder) -> dict[str, int]:
    """Registers a thread, stack (what is spilled) and shared memory, from the machine code."""
    (folder / "cubin").write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


def update_arguments(kernels, types, flags):
    table, scalars = torch.zeros(16, dtype=torch.int64), torch.zeros(16)
    param, gradient, state = (getattr(kernels.tl, name) for name in types)
    options = dict(TYPE=param, GRADIENT=gradient, STATE=state, HAS_MASTER=flags[0], AMSGRAD=flags[1])
    options |= dict(HAS_GRAD_SCALE=flags[2], MAY_SKIP=flags[2], BLOCK=BLOCK)
    return (table, table, table, scalars, scalars, scalars), options


def advance_arguments(tensors=300, lr=1e-3, on_device=False):
    table, scalars = torch.zeros(16, dtype=torch.int64), torch.zeros(16)
    numbers = (tensors, lr, 0.9, 0.999, 0.01, 1e-8, 1.0)
    options = dict(LR_ON_DEVICE=on_device, BETAS_ON_DEVICE=on_device, MAY_SKIP=on_device, TENSORS=128)
    return (table, table, scalars, scalars, scalars, scalars, scalars, *numbers), options


def assert_lean(compiled, folder, most_registers: int) -> None:
    used = resources(compiled, folder)
    assert "convert_layout" not in compiled.asm["ttgir"] and compiled.metadata.shared == 0 and used["SHARED"] == 0
    assert used["STACK"] == 0 and used["LOCAL"] == 0
    assert used["REG"] <= most_registers, used


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_compiles_without_spills_conversions_or_shared_memory(kernels, variant, architecture, tmp_path):
    types, flags, most_registers = VARIANTS[variant]
    arguments, options = update_arguments(kernels, types, flags)
    compiled = compile_for(kernels.update, architecture, arguments, options, kernels.WARPS)
    assert_lean(compiled, tmp_path, most_registers)
    lines = compiled.asm["ptx"].splitlines()
    loads, roots = ([n for n, line in enumerate(lines) if kind in line] for kind in ("ld.global", "sqrt."))
    assert max(loads) < min(roots)
    # A warp reads 32 neighbours: no thread takes several, and every root and quotient is IEEE's.
    assert not [line for line in lines if re.search(r"(ld|st)\.global\.v\d", line)]
    assert "sqrt.rn.f32" in compiled.asm["ptx"] and "div.rn.f32" in compiled.asm["ptx"]
    assert "approx" not in compiled.asm["ptx"] and "div.full" not in compiled.asm["ptx"]
    assert "popc.b32" in compiled.asm["ptx"]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_advance_computes_in_double(kernels, architecture, on_device, tmp_path):
    arguments, options = advance_arguments(on_device=on_device)
    compiled = compile_for(kernels.advance, architecture, arguments, options, warps=4)
    assert_lean(compiled, tmp_path, 40)
    assert "div.rn.f64" in compiled.asm["ptx"] and "div.full.f32" not in compiled.asm["ptx"]


def test_no_number_of_a_step_compiles_anything_anew(kernels):
    def key(**changes):
        return specialized(kernels.advance, 90, *advance_arguments(**changes))

    assert key() == key(tensors=1) == key(tensors=16) == key(lr=0.0) == key(lr=1.0)
    misaligned = torch.zeros(16)[1:]
    for function, (arguments, options), places in (
        (kernels.advance, advance_arguments(on_device=True), (3, 4, 5, 6)),
        (kernels.update, update_arguments(kernels, *VARIANTS["fp32, everything"][:2]), (4, 5)),
    ):
        moved = [misaligned if n in places else argument for n, argument in enumerate(arguments)]
        assert specialized(function, 90, arguments, options) == specialized(function, 90, moved, options)


def test_ranks_are_the_counts_before_each_word():
    mask = torch.rand(3000) < 0.4
    selection = select(mask, torch.empty(3000))
    assert selection.encoding == "bits"
    tiles = torch.nn.functional.pad(mask, (0, 72)).view(3, 1024).int()
    assert torch.equal(word_ranks(selection.index).view(3, 32).int(), (tiles.cumsum(1) - tiles)[:, ::32].int())
    assert word_ranks(selection.index).nbytes * 2 == selection.index.nbytes


# Around a block and around a tile, each density at both; whole tiles only where they cost the interpreter little.
SIZES = [(1, 1.0), (7, 0.5), (1023, 1.0), (1024, 0.5), (1025, 0.1), (2049, 1.0), (65_535, 0.03), (65_536, 0.03)]
SIZES += [(65_537, 0.03)]
LARGE = [*SIZES, (65_535, 0.5), (65_536, 0.1), (65_537, 1.0)]


@pytest.mark.parametrize("dtype, cases", [
    (torch.float32, LARGE), (torch.bfloat16, SIZES), (torch.float16, SIZES)
], ids=["fp32", "bf16", "fp16"])  # fmt: skip
def test_every_edge_of_blocks_and_tiles(place, dtype, cases):
    """States and parameters at each step against AdamW on the gathered entries."""
    params = [torch.nn.Parameter(torch.randn(size).to(device_of(place), dtype)) for size, _ in cases]
    masks = [(torch.rand(size) < density).index_fill(0, torch.tensor([size - 1]), True) for size, density in cases]
    before = [p.detach().clone() for p in params]
    wide = [p.detach()[mask.to(p.device)].float().requires_grad_() for p, mask in zip(params, masks, strict=True)]
    ours, theirs = MaskedAdam(params, lr=1e-3, amsgrad=True, masks=masks), AdamW(wide, lr=1e-3, amsgrad=True)
    ulp = CLOSE_ON[place] if dtype is torch.float32 else dict(rtol=torch.finfo(dtype).eps, atol=1e-7)
    for step in range(2):
        run(ours, params, [step])
        for p, q, mask in zip(params, wide, masks, strict=True):
            q.grad = p.grad[mask.to(p.device)].float()
        theirs.step()
        assert_unselected_equal(params, before, masks)
        for p, q, mask in zip(params, wide, masks, strict=True):
            torch.testing.assert_close(on_cpu(p)[mask], on_cpu(q).to(dtype), **ulp)
            for key, value in theirs.state[q].items():
                torch.testing.assert_close(on_cpu(ours.state[p][key]), on_cpu(value), **CLOSE_ON[place])
    assert_stepped_by(ours, place)
    assert {ours._selections[p].encoding for p in params} == {"runs", "bits", "offsets"}
    assert len(launches(ours)) == (0 if place == "cpu" else 1)
