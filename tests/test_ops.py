"""Squared per-sample gradients: the compiled operator, its reference and the matmul against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from squares import DTYPES, exact, kernel, problem, tolerance

from talos_fast.sensitivity.accumulate import (
    accumulate_squared_by_matmul,
    accumulate_squared_per_sample_,
    accumulate_squared_per_sample_reference,
)

pytestmark = pytest.mark.usefixtures("two_threads")
ONCE = dict(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("run", [accumulate_squared_per_sample_, kernel, accumulate_squared_per_sample_reference])
@settings(**ONCE)
@given(
    samples=st.integers(0, 4), tokens=st.integers(0, 20), outs=st.integers(0, 110), ins=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES), score_dtype=st.sampled_from(DTYPES[:2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_float64(run, device, samples, tokens, outs, ins, dtype, score_dtype, seed):
    scores, inputs, grads = problem(samples, tokens, outs, ins, dtype, score_dtype, device, seed)
    want = exact(scores, inputs, grads)
    assert run(scores, inputs, grads) is scores
    torch.testing.assert_close(scores.double(), want, **tolerance(scores, inputs))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (9, 1, 97, 257),
        (700, 1, 5, 3),
        (3, 50, 96, 256),
        (2, 513, 13, 33),
        (2, 1031, 100, 40),
        (5, 16, 192, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_tiles_and_token_runs(device, shape, dtype):
    score_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    scores, inputs, grads = problem(*shape, dtype, score_dtype, device)
    want = exact(scores, inputs, grads)
    kernel(scores, inputs, grads)
    torch.testing.assert_close(scores.double(), want, **tolerance(scores, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(device, dtype):
    scores, inputs, grads = problem(4, 6, 20, 24, dtype, torch.float32, device)
    inputs, grads = inputs[::2, 1:], grads.transpose(0, 1)[1:, ::2].transpose(0, 1)
    want = exact(scores, inputs, grads)
    assert not inputs.is_contiguous() and not grads.is_contiguous()
    kernel(scores, inputs, grads)
    torch.testing.assert_close(scores.double(), want, **tolerance(scores, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 9, 200, 300), (40, 1, 130, 70), (2, 300, 8, 16)], ids=str)
def test_repeats_bit_for_bit_on_any_number_of_threads(device, dtype, shape):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(kernel(*problem(*shape, dtype, device=device)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_more_samples_than_the_workspace_holds(device):
    scores, inputs, grads = problem(30, 700, 128, 256, device=device)  # 32 MB of panels
    want = exact(scores, inputs, grads)
    kernel(scores, inputs, grads)
    torch.testing.assert_close(scores.double(), want, **tolerance(scores, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_time_first_and_channels_first_layouts(device, dtype, tokens):
    scores, inputs, grads = problem(5, tokens, 136, 40, dtype, torch.float32, device)
    want = exact(scores, inputs, grads)
    inputs = inputs.transpose(0, 1).contiguous().transpose(0, 1)  # (tokens, samples, ins) in memory
    grads = grads.mT.contiguous().mT  # (samples, outs, tokens) in memory
    kernel(scores, inputs, grads)
    torch.testing.assert_close(scores.double(), want, **tolerance(scores, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_operands_accumulate_in_fp32(device, dtype):
    scores, inputs, grads = problem(3, 200, 70, 50, dtype, torch.float32, device)
    want, magnitudes = (
        exact(scores, inputs, grads),
        torch.einsum("nto,nti->noi", grads.double().abs(), inputs.double().abs()),
    )
    products = torch.einsum("nto,nti->noi", grads.double(), inputs.double()).abs()
    off = 2.0**-24 * 200 * magnitudes  # an ulp of the sum a token, at the very most
    bound = (2 * products * off + off.square()).sum(0) + 2.0**-22 * want
    kernel(scores, inputs, grads)
    assert ((scores.double() - want).abs() <= bound).all()


def test_float64_operands_keep_what_fp32_loses(device):
    near = torch.tensor([1 + 2.0**-40, -1.0], dtype=torch.float64, device=device).reshape(1, 2, 1)
    scores, ones = near.new_zeros(1, 1), torch.ones_like(near)
    kernel(scores, near, ones)
    kernel(scores, ones, near)
    assert scores.item() == 2 * 2.0**-80


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e12])
@pytest.mark.parametrize("precision,ulp", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_precision_rounds_the_operands_without_overflow_or_underflow(device, precision, ulp, magnitude):
    scores, inputs, grads = problem(4, 9, 30, 20, device=device)
    inputs, scores = inputs * magnitude, scores * 0
    want, magnitudes = exact(scores, inputs, grads), torch.einsum("nto,nti->noi", grads.abs(), inputs.abs()).double()
    products = torch.einsum("nto,nti->noi", grads.double(), inputs.double()).abs()
    accumulate_squared_per_sample_(scores.requires_grad_(False), inputs, grads, precision=precision)
    off = 1.1 * ulp * magnitudes  # both operands are off by half an ulp
    bound = (2 * products * off + off.square()).sum(0) + 1e-44  # fp32 scores of 1e-50 are zero
    assert ((scores.double() - want).abs() <= bound).all()
    assert magnitude < 1 or (scores > 0).all()


def test_precision_of_nothing_and_of_zeros(device):
    scores = torch.ones(2, 3, device=device)
    accumulate_squared_per_sample_(scores, torch.zeros(0, 4, 3, device=device),
                                       torch.zeros(0, 4, 2, device=device), precision=torch.float16)  # fmt: skip
    accumulate_squared_per_sample_(scores, torch.zeros(1, 4, 3, device=device),
                                       torch.ones(1, 4, 2, device=device), precision=torch.float16)  # fmt: skip
    assert (scores == 1).all()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_of_tiny_shapes(device, tokens, dtype):
    scores, inputs, grads = problem(3, tokens, 5, 4, dtype, torch.float32, device)
    before, want = scores.double().clone(), exact(scores, inputs, grads)
    with torch.autocast(device, torch.bfloat16):  # must not reach the products
        accumulate_squared_by_matmul(scores, inputs, grads, torch.tensor(0.5, device=device))
    torch.testing.assert_close(scores.double(), before + 0.5 * (want - before), **tolerance(scores, inputs))


@pytest.mark.parametrize("run", [torch.ops.talos_fast.accumulate_squared_per_sample_,
                                 accumulate_squared_per_sample_reference])  # fmt: skip
@pytest.mark.parametrize("score_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("samples", [3, 9])  # nine: on tensor cores, parts of the samples that are then added
def test_scale_multiplies_squares(run, device, samples, score_dtype):
    scores, inputs, grads = problem(samples, 6, 50, 40, score_dtype, score_dtype, device)
    before, want = scores.double().clone(), exact(scores, inputs, grads)
    run(scores, inputs, grads, torch.tensor(0.125, dtype=score_dtype, device=device))
    torch.testing.assert_close(scores.double(), before + 0.125 * (want - before), **tolerance(scores, inputs))


def test_leaves_its_inputs_alone(device):
    scores, inputs, grads = problem(2, 3, 4, 5, device=device)
    before = inputs.clone(), grads.clone()
    kernel(scores, inputs, grads)
    assert torch.equal(inputs, before[0]) and torch.equal(grads, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [3, 9])  # nine: in parts, which a second kernel adds
def test_the_cuda_kernels_run_in_the_current_stream(samples, dtype):
    """After the stream's work before them, and before the work behind them, whatever other streams do."""
    scores, inputs, grads = problem(samples, 6, 50, 40, dtype, device="cuda")
    want = exact(scores, inputs, grads).cpu()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = kernel(scores, inputs * 1, grads).cpu()
    torch.testing.assert_close(got.double(), want, **tolerance(scores, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # whole tiles, ragged ones, few tiles that are cut over the samples, shapes of ViT-B/32 and ViT-L/14
    [(1, 64, 256, 128), (3, 33, 200, 136), (64, 50, 64, 72), (8, 50, 3072, 768), (4, 257, 1024, 1024)],
    ids=str,
)
def test_the_cuda_kernel_equals_the_reference(shape, dtype):
    scores, inputs, grads = problem(*shape, dtype, torch.float32, "cuda")
    want = accumulate_squared_per_sample_reference(scores.double(), inputs, grads)
    again = kernel(scores.clone(), inputs, grads)
    torch.testing.assert_close(kernel(scores, inputs, grads).double(), want, **tolerance(scores, inputs))
    assert torch.equal(scores, again)
