"""The operator of squared per-sample gradients in torch: what it refuses and in which words, opcheck, torch.compile."""

import pytest
import torch
from squares import DTYPES, exact, problem

from talos_fast.errors import TalosError
from talos_fast.sensitivity.accumulate import (
    accumulate_squared_per_sample_,
    accumulate_squared_per_sample_reference,
)

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
@pytest.mark.parametrize("run", [accumulate_squared_per_sample_, accumulate_squared_per_sample_reference])
def test_says_what_is_wrong(run, text):
    with pytest.raises(TalosError, match=text):
        run(*BAD[text](*problem(2, 3, 4, 5)))


@pytest.mark.parametrize("misfit", MISFITS)
def test_says_which_shapes_do_not_fit(misfit):
    with pytest.raises(TalosError, match=r"do not fit: they must be \(outs, ins\)"):
        accumulate_squared_per_sample_(*misfit(*problem(2, 3, 4, 5)))


def test_says_that_devices_differ():
    scores, inputs, grads = problem(2, 3, 4, 5)
    with pytest.raises(TalosError, match="must be on one device"):
        accumulate_squared_per_sample_(scores, inputs.to("meta"), grads)


@pytest.mark.parametrize("make", [*BAD.values(), *MISFITS])
def test_the_raw_operator_checks_too(make, device):
    args = make(*problem(2, 3, 4, 5, device=device))
    before = args[0].clone()
    with pytest.raises((RuntimeError, TalosError)):
        torch.ops.talos_fast.accumulate_squared_per_sample_(*args)
    assert torch.equal(args[0], before)


@pytest.mark.gpu
@pytest.mark.parametrize("stray", range(4), ids=["scores", "inputs", "grad_outputs", "scale"])
def test_the_raw_operator_refuses_tensors_of_two_devices(stray):
    """A kernel would read the host's memory."""
    arguments = [*problem(2, 3, 4, 5, device="cuda"), torch.ones((), device="cuda")]
    arguments[stray] = arguments[stray].cpu()
    with pytest.raises((RuntimeError, TalosError), match="device"):
        torch.ops.talos_fast.accumulate_squared_per_sample_(*arguments)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_opcheck(device, dtype):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    arguments = problem(2, 3, 4, 5, dtype, torch.float32, device)
    torch.library.opcheck(torch.ops.talos_fast.accumulate_squared_per_sample_.default, arguments)


def test_compiles_without_a_graph_break(device):
    def double_then_accumulate(scores, inputs, grads):
        return accumulate_squared_per_sample_(scores, inputs * 2, grads)

    scores, inputs, grads = problem(2, 3, 4, 5, device=device)
    want = exact(scores, inputs * 2, grads)
    got = torch.compile(double_then_accumulate, fullgraph=True, backend="aot_eager")(scores, inputs, grads)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones((), dtype=torch.float64)])
def test_says_what_a_scale_must_be(scale, device):
    arguments = *problem(2, 3, 4, 5, device=device), scale.to(device)
    with pytest.raises(TalosError, match=f"scale must be one number of torch.float32 on {device}"):
        accumulate_squared_per_sample_reference(*arguments)
    with pytest.raises((RuntimeError, TalosError), match="scale must be one number"):
        torch.ops.talos_fast.accumulate_squared_per_sample_(*arguments)


def test_says_which_precisions_there_are():
    with pytest.raises(
        TalosError, match="precision must be torch.bfloat16, torch.float16 or None, but is torch.float32"
    ):
        accumulate_squared_per_sample_(*problem(2, 3, 4, 5), precision=torch.float32)
