"""The AMX kernel without AMX: the very code of csrc/amx_tile.h on an emulated one, against float64 and the manual."""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_abi import library

from talos_fast.sensitivity.accumulate import accumulate_squared_per_sample_

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulated AMX")
Int3, Int4 = ctypes.c_int64 * 3, ctypes.c_int64 * 4


class Problem(ctypes.Structure):
    _fields_ = (
        ("grads", ctypes.c_void_p), ("inputs", ctypes.c_void_p), ("grads_strides", Int3), ("inputs_strides", Int3),
        ("shape", Int4), ("scale", ctypes.c_float), ("scores", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    built = tmp_path_factory.mktemp("twin") / "amx.so"
    command = ["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-shared", "-fPIC"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    subprocess.run([*command, *includes, str(ROOT / "tests/amx_twin.cpp"), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    for function in (loaded.run_amx_twin, loaded.run_amx_trapped, loaded.run_unconfigured):
        function.restype = ctypes.c_char_p
    loaded.run_amx_twin.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.run_amx_trapped.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return loaded


def problem(scores, inputs, grads, scale=1.0):
    return Problem(
        grads.data_ptr(), inputs.data_ptr(), Int3(*grads.stride()), Int3(*inputs.stride()),
        Int4(*inputs.shape[:2], *scores.shape), scale, scores.data_ptr(),
    )  # fmt: skip


def run(twin, scores, inputs, grads, scale=1.0, threads=1):
    assert twin.run_amx_twin(ctypes.byref(problem(scores, inputs, grads, scale)), threads) is None
    return scores


def operands(samples, tokens, outs, ins):
    spread = 2.0 ** torch.randint(-3, 4, (samples, 1, 1))
    return (torch.randn(samples, tokens, ins) * spread).bfloat16(), torch.randn(samples, tokens, outs).bfloat16()


def check(scores, before, inputs, grads, scale=1.0):
    """Exact products, at most a rounding a pair of tokens and three a step in each sum, one a square."""
    x, g = inputs.double(), grads.double()
    products, magnitudes = torch.einsum("nto,nti->noi", g, x), torch.einsum("nto,nti->noi", g.abs(), x.abs())
    roundings = min(16, inputs.shape[1] / 2) + 3 * (inputs.shape[1] // 32 + 1)
    off = roundings * 2.0**-24 * magnitudes
    squares = products.square().sum(0)
    bound = (2 * products.abs() * off + off.square()).sum(0) + (inputs.shape[0] + 2) * 2.0**-23 * squares
    want = before.double() + scale * squares
    assert ((scores.double() - want).abs() <= scale * bound + 2.0**-23 * want).all()


# Odd tails in tokens, outs and ins; less than a register tile, a step and a pair; several of each; two runs of tokens;
# and more panels than stay in the cache, so that samples pass over a tile in groups.
SHAPES = [(1, 1, 1, 1), (2, 2, 3, 31), (3, 50, 32, 64), (5, 33, 70, 33), (2, 63, 33, 270), (2, 300, 17, 40),
          (7, 257, 90, 66), (1, 64, 300, 20)]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_within_its_bound(twin, shape):
    inputs, grads = operands(*shape)
    scores = torch.rand(shape[2:])
    before = scores.clone()
    check(run(twin, scores, inputs, grads, scale=0.25), before, inputs, grads, scale=0.25)


@needs_compiler
def test_reads_any_strides(twin):
    inputs, grads = operands(40, 3, 64, 96)
    inputs = inputs.transpose(0, 1)[:, ::2, 5:50]  # time first, every second token, some features
    grads = grads.transpose(0, 1)[:, ::2].mT.contiguous().mT  # channels first
    scores = torch.zeros(64, 45)
    check(run(twin, scores, inputs, grads), torch.zeros(64, 45), inputs, grads)


@needs_compiler
def test_scores_do_not_depend_on_the_number_of_threads(twin):
    inputs, grads = operands(4, 40, 200, 130)
    one = run(twin, torch.zeros(200, 130), inputs, grads)
    for threads in (2, 5):
        assert torch.equal(run(twin, torch.zeros(200, 130), inputs, grads, threads=threads), one)


def of_the_manual(inputs, grads):
    """Scores of one sample, by the manual: even and odd tokens of each 32 apart, every sum rounded to fp32."""
    tokens = inputs.shape[1]
    pad = (0, 0, 0, -tokens % 32)
    x, g = (torch.nn.functional.pad(tensor[0].double(), pad) for tensor in (inputs, grads))
    total = torch.zeros(g.shape[1], x.shape[1])
    for step in range(0, len(x), 32):
        halves = torch.zeros(2, *total.shape)
        for token in range(step, step + 32):
            products = torch.outer(g[token], x[token])  # exact
            halves[token % 2] = (halves[token % 2].double() + products).float()
        total += halves[0] + halves[1]
    return total * total


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 31, 50, 96])
def test_every_bit_is_that_of_the_manual(twin, tokens):
    inputs, grads = operands(1, tokens, 40, 50)
    assert torch.equal(run(twin, torch.zeros(40, 50), inputs, grads), of_the_manual(inputs, grads))


@needs_compiler
def test_values_below_the_normal_ones_count_as_zero(twin):
    small = torch.tensor([2.0**-126, 2.0**-127, 2.0**-120]).bfloat16().reshape(1, 1, 3)
    grads = torch.tensor([2.0**62, 2.0**-10]).bfloat16().reshape(1, 1, 2)
    scores = run(twin, torch.zeros(2, 3), small, grads)
    assert scores.tolist() == [[2.0**-128, 0.0, 2.0**-116], [0.0, 0.0, 0.0]]  # the last product is 2^-130


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="not x86 under Linux")
@pytest.mark.parametrize("shape", [(1, 50, 40, 50), (3, 33, 70, 20), (2, 300, 32, 32)], ids=str)
def test_the_instructions_themselves_do_what_the_emulator_does(twin, shape):
    """The assembly as it is encoded; on a processor without AMX every instruction is trapped and decoded."""
    inputs, grads = operands(*shape)
    by_instructions, trapped = torch.zeros(shape[2:]), ctypes.c_int64()
    arguments = ctypes.byref(problem(by_instructions, inputs, grads)), 2, ctypes.byref(trapped)
    has_amx = may_use_amx()  # asks for it
    assert twin.run_amx_trapped(*arguments) is None
    assert torch.equal(by_instructions, run(twin, torch.zeros(shape[2:]), inputs, grads, threads=2))
    assert trapped.value == 0 if has_amx else trapped.value >= 100


@needs_compiler
def test_the_emulator_notices_registers_that_are_not_configured(twin):
    assert b"none is configured" in twin.run_unconfigured()


def may_use_amx():
    """Whether the processor multiplies bfloat16 tiles, Linux lets this process use them, and nothing caps torch."""
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.is_file() and {"amx_tile", "amx_bf16"} <= set(cpuinfo.read_text().split())
    asked = listed and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data)
    return asked and "ATEN_CPU_CAPABILITY" not in os.environ


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 processor")
def test_the_operator_takes_amx_exactly_where_it_may(twin):
    library("_C")
    inputs, grads = operands(1, 70, 100, 90)
    scores = accumulate_squared_per_sample_(torch.zeros(100, 90), inputs, grads)
    by_amx = run(twin, torch.zeros(100, 90), inputs, grads)
    torch.testing.assert_close(scores, by_amx, rtol=1e-4, atol=1e-6 * float(by_amx.max()))
    assert torch.equal(scores, by_amx) == may_use_amx()  # other instructions sum in another order


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 processor")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_library_holds_the_instructions():
    dump = subprocess.run(["objdump", "-d", str(library("_C"))], capture_output=True, text=True, check=True).stdout
    counts = {name: dump.count(f"\t{name} ") for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored")}
    assert counts["ldtilecfg"] == 1 and "\ttilerelease" in dump
    assert all(count >= 4 for name, count in counts.items() if name != "ldtilecfg"), counts
