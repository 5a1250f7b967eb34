"""The tensor-core kernel without a GPU: the very code of csrc/mma_tile.h on an emulated one, against float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulated GPU")
Int3, Int4 = ctypes.c_int64 * 3, ctypes.c_int64 * 4


class Problem(ctypes.Structure):
    _fields_ = (
        ("grads", ctypes.c_void_p), ("inputs", ctypes.c_void_p),
        ("grads_bytes", ctypes.c_int64), ("inputs_bytes", ctypes.c_int64),
        ("grads_strides", Int3), ("inputs_strides", Int3), ("shape", Int4), ("splits", ctypes.c_int64),
        ("scale", ctypes.c_void_p), ("scores", ctypes.c_void_p), ("parts", ctypes.c_void_p),
    )  # fmt: skip


class Report(ctypes.Structure):
    _fields_ = (("bank_conflicts", ctypes.c_int64), ("aligned", ctypes.c_int64), ("error", ctypes.c_char * 80))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    built = tmp_path_factory.mktemp("twin") / "twin.so"
    command = ["g++", "-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    subprocess.run([*command, *includes, str(ROOT / "tests/mma_twin.cpp"), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built))
    library.choose_splits.restype = ctypes.c_int64
    library.choose_splits.argtypes = [ctypes.c_int64] * 3
    return library


def span(tensor):
    """Bytes from the first to behind the last entry."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def run(twin, scores, inputs, grads, splits=1, scale=None, late=False, reversed_=False):
    outs, ins = scores.shape
    parts = torch.full((splits, outs, ins), float("nan"))
    problem = Problem(
        grads.data_ptr(), inputs.data_ptr(), span(grads), span(inputs), Int3(*grads.stride()), Int3(*inputs.stride()),
        Int4(*inputs.shape[:2], outs, ins), splits, None if scale is None else scale.data_ptr(), scores.data_ptr(),
        parts.data_ptr(),
    )  # fmt: skip
    report = Report()
    twin.run_twin(KINDS[inputs.dtype], ctypes.byref(problem), int(late), int(reversed_), ctypes.byref(report))
    assert report.error == b""
    if splits > 1:
        scores += (1.0 if scale is None else scale) * parts.sum(0)
    return report


def operands(samples, tokens, outs, ins, dtype):
    # fp16 would overflow and underflow at either end of this range, bfloat16 and its splitting must not.
    spread = 2.0 ** torch.randint(-6, 7, (samples, 1, 1))
    return (torch.randn(samples, tokens, ins) * spread).to(dtype), torch.randn(samples, tokens, outs).to(dtype)


def check(scores, before, inputs, grads, scale=1.0):
    """Within the error of the kernel's arithmetic: of splitting 2^-15 a product, of fp32 sums half an ulp a step."""
    x, g = inputs.double(), grads.double()
    products, magnitudes = torch.einsum("nto,nti->noi", g, x), torch.einsum("nto,nti->noi", g.abs(), x.abs())
    steps = inputs.shape[1] / 16 * 3 + 2
    off = (steps * 2.0**-24 + (2.0**-15 if inputs.dtype is torch.float32 else 0.0)) * magnitudes
    squares = products.square().sum(0)
    bound = (2 * products.abs() * off + off.square()).sum(0) + (inputs.shape[0] + 2) * 2.0**-24 * squares
    want = before.double() + scale * squares
    assert ((scores.double() - want).abs() <= scale * bound + 2.0**-23 * want).all()


# Odd tails in tokens, outs and ins; samples shorter than one instruction, than one stage, and of many stages.
SHAPES = [(1, 1, 1, 1), (2, 17, 9, 130), (3, 50, 136, 24), (1, 33, 128, 128), (7, 16, 40, 8), (1, 150, 20, 12)]


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_within_its_bound(twin, shape, dtype, late):
    inputs, grads = operands(*shape, dtype)
    scores = torch.rand(shape[2:])
    before = scores.clone()
    report = run(twin, scores, inputs, grads, late=late, reversed_=shape[0] % 2 == 0)
    check(scores, before, inputs, grads)
    assert report.bank_conflicts == 0


# Of operands -> how many of the two are copied 16 bytes at a time.
VIEWS = {
    "whole": (lambda operand: operand, 2),
    "rows that end inside 16 bytes": (lambda operand: operand[:, :, :-1], 2),
    "8 bytes off": (lambda operand: operand[:, :, 8 // operand.element_size() :], 0),
    "from the second": (lambda operand: operand[:, :, 1:], 0),
    "every second": (lambda operand: operand[:, :, ::2], 0),
}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_reads_any_strides(twin, dtype, view):
    inputs, grads = operands(20, 3, 32, 272, dtype)  # time first: (tokens, samples, features)
    of, aligned = VIEWS[view]
    inputs, grads = of(inputs.transpose(0, 1)), of(grads.transpose(0, 1))
    scores = torch.zeros(grads.shape[2], inputs.shape[2])
    report = run(twin, scores, inputs, grads)
    assert report.aligned == aligned
    check(scores, torch.zeros_like(scores), inputs, grads)


def test_reaches_beyond_two_to_the_31_entries(twin):
    memory = torch.from_numpy(np.zeros(2**31 + 8, np.float16))  # what is not written takes no memory
    inputs, grads = memory.as_strided((2, 1, 8), (2**31, 8, 1)), torch.randn(2, 1, 8).half()
    inputs[1] = torch.randn(1, 8)
    scores = torch.zeros(8, 8)
    run(twin, scores, inputs, grads)
    check(scores, torch.zeros_like(scores), inputs, grads)


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_parts_of_the_samples_add_up(twin, splits):
    inputs, grads = operands(5, 20, 24, 16, torch.bfloat16)
    scores, scale = torch.rand(24, 16), torch.tensor(0.25)
    before = scores.clone()
    run(twin, scores, inputs, grads, splits=splits, scale=scale)
    check(scores, before, inputs, grads, scale=0.25)


def test_scale_multiplies_squares(twin):
    inputs, grads = operands(2, 5, 8, 8, torch.float16)
    scores = torch.rand(8, 8)
    before = scores.clone()
    run(twin, scores, inputs, grads, scale=torch.tensor(2.0**-20))
    check(scores, before, inputs, grads, scale=2.0**-20)


def test_splitting_keeps_what_bfloat16_loses(twin):
    inputs = torch.tensor([1 + 2.0**-12, -1.0]).reshape(1, 2, 1)  # rounds to 1 - 1 = 0 in bfloat16
    scores = torch.zeros(1, 1)
    run(twin, scores, inputs, torch.ones(1, 2, 1))
    assert scores.item() == 2.0**-24


def test_splitting_is_off_by_two_to_the_minus_15_at_most(twin):
    """Of what rounds worst: both low parts are nearly half an ulp of bfloat16, and what is left of them too."""
    worst = torch.tensor(1 + 2.0**-8 - 2.0**-17 - 2.0**-23).reshape(1, 1, 1)
    scores = torch.zeros(1, 1)
    run(twin, scores, worst, worst)
    check(scores, torch.zeros(1, 1), worst, worst)
    off = 1 - scores.double().sqrt().item() / worst.double().square().item()
    assert 0.98 * 2.0**-15 < off < 2.0**-15


def test_few_tiles_are_cut_over_the_samples(twin):
    assert twin.choose_splits(132, 64, 132) == 1
    assert twin.choose_splits(36, 64, 132) == 7  # ViT-B/32, 768 x 768 on an H100: 252 blocks of 264
    assert twin.choose_splits(1, 64, 132) == 16  # at least four samples a part
    assert twin.choose_splits(1, 3, 132) == 1
    for tiles in range(1, 300, 7):
        assert 1 <= twin.choose_splits(tiles, 100, 132) <= 25
