import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talos_fast import ops
from talos_fast.errors import TalosError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ONCE = dict(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problem(samples, tokens, outs, ins, dtype=torch.float32, score_dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, tokens, ins, generator=generator).to(device, dtype)
    grads = torch.randn(samples, tokens, outs, generator=generator).to(device, dtype)
    scores = torch.rand(outs, ins, generator=generator).to(device, score_dtype)
    return scores, inputs, grads


def exact(scores, inputs, grads):
    per_sample = torch.einsum("nto,nti->noi", grads.double(), inputs.double())
    return scores.double() + per_sample.square().sum(0)


def tolerance(scores, inputs):
    # What summing in the scores' dtype costs; the inputs' own rounding is the same on both sides.
    eps = torch.finfo(scores.dtype).eps
    if inputs.is_cuda and inputs.dtype is scores.dtype is torch.float32:
        eps = 3 * 2.0**-18  # products of bfloat16 parts
    return dict(rtol=8 * eps * max(1, inputs.shape[1]) ** 0.5, atol=8 * eps * max(1, inputs.shape[0] * inputs.shape[1]))


def kernel(scores, inputs, grads):
    """The compiled operator itself: on CUDA the function takes another way for tiny shapes."""
    torch.ops.talos_fast.accumulate_squared_per_sample_(scores, inputs, grads)
    return scores


@pytest.mark.parametrize(
    "run", [ops.accumulate_squared_per_sample_, kernel, ops.accumulate_squared_per_sample_reference]
)
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
    scores, inputs, grads = problem(5, tokens, 48, 40, dtype, torch.float32, device)
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


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e12])
@pytest.mark.parametrize("precision,ulp", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_precision_rounds_the_operands_without_overflow_or_underflow(device, precision, ulp, magnitude):
    scores, inputs, grads = problem(4, 9, 30, 20, device=device)
    inputs, scores = inputs * magnitude, scores * 0
    want, magnitudes = exact(scores, inputs, grads), torch.einsum("nto,nti->noi", grads.abs(), inputs.abs()).double()
    products = torch.einsum("nto,nti->noi", grads.double(), inputs.double()).abs()
    ops.accumulate_squared_per_sample_(scores.requires_grad_(False), inputs, grads, precision=precision)
    off = 1.1 * ulp * magnitudes  # both operands are off by half an ulp
    bound = (2 * products * off + off.square()).sum(0) + 1e-44  # fp32 scores of 1e-50 are zero
    assert ((scores.double() - want).abs() <= bound).all()
    assert magnitude < 1 or (scores > 0).all()


def test_precision_of_nothing_and_of_zeros(device):
    scores = torch.ones(2, 3, device=device)
    ops.accumulate_squared_per_sample_(scores, torch.zeros(0, 4, 3, device=device),
                                       torch.zeros(0, 4, 2, device=device), precision=torch.float16)  # fmt: skip
    ops.accumulate_squared_per_sample_(scores, torch.zeros(1, 4, 3, device=device),
                                       torch.ones(1, 4, 2, device=device), precision=torch.float16)  # fmt: skip
    assert (scores == 1).all()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_of_tiny_shapes(device, tokens, dtype):
    scores, inputs, grads = problem(3, tokens, 5, 4, dtype, torch.float32, device)
    before, want = scores.double().clone(), exact(scores, inputs, grads)
    with torch.autocast(device, torch.bfloat16):  # must not reach the products
        ops.accumulate_squared_by_matmul(scores, inputs, grads, torch.tensor(0.5, device=device))
    torch.testing.assert_close(scores.double(), before + 0.5 * (want - before), **tolerance(scores, inputs))


@pytest.mark.parametrize("run", [torch.ops.talos_fast.accumulate_squared_per_sample_,
                                 ops.accumulate_squared_per_sample_reference])  # fmt: skip
@pytest.mark.parametrize("score_dtype", DTYPES[:2], ids=str)
def test_scale_multiplies_squares(run, device, score_dtype):
    scores, inputs, grads = problem(3, 6, 50, 40, score_dtype, score_dtype, device)
    before, want = scores.double().clone(), exact(scores, inputs, grads)
    run(scores, inputs, grads, torch.tensor(0.125, dtype=score_dtype, device=device))
    torch.testing.assert_close(scores.double(), before + 0.125 * (want - before), **tolerance(scores, inputs))


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones((), dtype=torch.float64)])
def test_says_what_a_scale_must_be(scale):
    arguments = problem(2, 3, 4, 5)
    with pytest.raises(TalosError, match="scale must be one number of torch.float32 on cpu"):
        ops.accumulate_squared_per_sample_reference(*arguments, scale)
    with pytest.raises((RuntimeError, TalosError), match="scale must be one number"):
        torch.ops.talos_fast.accumulate_squared_per_sample_(*arguments, scale)


def test_says_which_precisions_there_are():
    with pytest.raises(
        TalosError, match="precision must be torch.bfloat16, torch.float16 or None, but is torch.float32"
    ):
        ops.accumulate_squared_per_sample_(*problem(2, 3, 4, 5), precision=torch.float32)


def test_leaves_its_inputs_alone(device):
    scores, inputs, grads = problem(2, 3, 4, 5, device=device)
    before = inputs.clone(), grads.clone()
    kernel(scores, inputs, grads)
    assert torch.equal(inputs, before[0]) and torch.equal(grads, before[1])


BAD = {
    "scores must be \\(outs, ins\\)": lambda s, x, g: (s[0], x, g),
    "inputs must be \\(samples, tokens, ins\\)": lambda s, x, g: (s, x[0], g),
    "grad_outputs must be \\(samples, tokens, outs\\)": lambda s, x, g: (s, x, g[0]),
    "scores must be float32 or float64": lambda s, x, g: (s.bfloat16(), x, g),
    "scores must be contiguous": lambda s, x, g: (s.t().contiguous().t(), x, g),
    "inputs must be float32, float64, bfloat16 or float16": lambda s, x, g: (s, x.int(), g.int()),
    "cast one to the other's": lambda s, x, g: (s, x, g.double()),
}
MISFITS = [
    lambda s, x, g: (s, x[..., :4], g),
    lambda s, x, g: (s, x, g[..., :3]),
    lambda s, x, g: (s, x, g[:1]),
    lambda s, x, g: (s, x, g[:, :2]),
]


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("run", [ops.accumulate_squared_per_sample_, ops.accumulate_squared_per_sample_reference])
def test_says_what_is_wrong(run, text):
    with pytest.raises(TalosError, match=text):
        run(*BAD[text](*problem(2, 3, 4, 5)))


@pytest.mark.parametrize("misfit", MISFITS)
def test_says_which_shapes_do_not_fit(misfit):
    with pytest.raises(TalosError, match=r"do not fit: they must be \(outs, ins\)"):
        ops.accumulate_squared_per_sample_(*misfit(*problem(2, 3, 4, 5)))


def test_says_that_devices_differ():
    scores, inputs, grads = problem(2, 3, 4, 5)
    with pytest.raises(TalosError, match="must be on one device"):
        ops.accumulate_squared_per_sample_(scores, inputs.to("meta"), grads)


@pytest.mark.parametrize("make", [*BAD.values(), *MISFITS])
def test_the_raw_operator_checks_too(make, device):
    args = make(*problem(2, 3, 4, 5, device=device))
    before = args[0].clone()
    with pytest.raises((RuntimeError, TalosError)):
        torch.ops.talos_fast.accumulate_squared_per_sample_(*args)
    assert torch.equal(args[0], before)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_opcheck(device, dtype):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    arguments = problem(2, 3, 4, 5, dtype, torch.float32, device)
    torch.library.opcheck(torch.ops.talos_fast.accumulate_squared_per_sample_.default, arguments)


def test_compiles_without_a_graph_break(device):
    def double_then_accumulate(scores, inputs, grads):
        return ops.accumulate_squared_per_sample_(scores, inputs * 2, grads)

    scores, inputs, grads = problem(2, 3, 4, 5, device=device)
    want = exact(scores, inputs * 2, grads)
    got = torch.compile(double_then_accumulate, fullgraph=True, backend="aot_eager")(scores, inputs, grads)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


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
from talos_fast.optim.operator import masked_adam_reference
from talos_fast.optim.plan import select
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for density in (0.3, 0.02, 1):
        param, mask = torch.randn(5000, dtype=dtype), torch.rand(5000) < density
        selection, wide = select(mask, param), torch.promote_types(dtype, torch.float32)
        ours = [[param], [torch.randn(5000, dtype=dtype)], *torch.rand(3, 1, selection.count, dtype=wide).unbind(),
                [param[mask].to(wide)] if wide != dtype else [], [selection.work], [selection.index]]
        ours[2:5] = [list(moments) for moments in ours[2:5]]
        theirs = [[t if t is None else t.clone() for t in column] for column in ours]
        scalars = dict(decay=0.999, beta1=0.9, beta2=0.99, step_size=1e-2, correction=0.3, eps=1e-8, grad_scale=2.0)
        torch.ops.talos_fast.masked_adam_(*ours, **scalars, maximize=True)
        masked_adam_reference(*theirs, **scalars, maximize=True)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # whole tiles, ragged ones, few tiles that are cut over the samples, shapes of ViT-B/32 and ViT-L/14
    [(1, 64, 256, 128), (3, 33, 200, 136), (64, 50, 64, 72), (8, 50, 3072, 768), (4, 257, 1024, 1024)],
    ids=str,
)
def test_the_cuda_kernel_equals_the_reference(shape, dtype):
    scores, inputs, grads = problem(*shape, dtype, torch.float32, "cuda")
    want = ops.accumulate_squared_per_sample_reference(scores.double(), inputs, grads)
    again = kernel(scores.clone(), inputs, grads)
    torch.testing.assert_close(kernel(scores, inputs, grads).double(), want, **tolerance(scores, inputs))
    assert torch.equal(scores, again)


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
