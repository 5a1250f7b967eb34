"""Selections: what each encoding costs, that none loses an entry, and the operator on each against its reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talos_fast import MaskedAdam, ops
from talos_fast.optim.operator import masked_adam_reference
from talos_fast.optim.plan import BLOCK, ROW_BYTES, select

SCALARS = dict(decay=0.999, beta1=0.9, beta2=0.99, step_size=1e-2, correction=0.3, eps=1e-8)
SIZES = [1, 7, 1023, 1024, 1025, 65_535, 65_536, 65_537, 200_000]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_mask(size, density):
    return torch.rand(size) < density


def stripes(size, width):
    return torch.arange(size) // width % 2 == 0


def test_bytes_an_entry():
    def cost(mask):
        selection = select(mask, torch.empty(mask.shape))
        assert selection.count == int(mask.sum())
        return selection.encoding, selection.nbytes / selection.count

    size = 2**20
    assert cost(torch.ones(size, dtype=torch.bool)) == ("runs", ROW_BYTES / BLOCK)
    assert cost(stripes(size, 512).view(1024, 1024)) == ("runs", ROW_BYTES / 512)
    kind, bytes_an_entry = cost(random_mask(size, 0.5))
    assert kind == "bits" and bytes_an_entry == pytest.approx(0.15625 / 0.5, rel=0.01)
    kind, bytes_an_entry = cost(random_mask(size, 0.03))
    assert kind == "offsets" and bytes_an_entry == pytest.approx(2 + 32 / 983, rel=0.01)
    assert [cost(random_mask(size, d))[0] for d in (0.07, 0.09)] == ["offsets", "bits"]


def test_an_empty_third_costs_nothing():
    mask = random_mask((3 * 64, 1024), 0.6)
    mask[128:] = False
    assert select(mask, torch.empty(mask.shape)).work.shape[0] == 128


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from(SIZES), density=st.sampled_from([0, 0.001, 0.03, 0.1, 0.5, 0.9, 1]), seed=st.integers(0, 9))
def test_no_entry_is_lost(size, density, seed):
    torch.manual_seed(seed)
    mask = random_mask(size, density)
    selection = select(mask, torch.empty(size))
    assert torch.equal(torch.from_numpy(selection.flags()), mask)
    assert torch.equal(selection.positions, mask.nonzero()[:, 0])
    rows = selection.work
    assert int(rows[:, 3].sum()) == selection.count and bool((rows[:, 3] <= BLOCK).all())
    assert torch.equal(rows[:, 2], rows[:, 3].cumsum(0) - rows[:, 3])


def problem(mask, dtype, amsgrad=True, device="cpu"):
    wide = torch.promote_types(dtype, torch.float32)
    param, grad = torch.randn(mask.shape).to(device, dtype), torch.randn(mask.shape).to(device, dtype)
    selection = select(mask, param)
    moments = [torch.rand(selection.count, dtype=wide, device=device) for _ in range(3 if amsgrad else 2)]
    master = param.view(-1)[selection.positions].to(wide) * (1 + 1e-4) if wide != dtype else None
    return [param, grad, *moments, *([] if amsgrad else [None]), master, selection.work, selection.index]


def clone(tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [
    torch.ones(65_537, dtype=torch.bool), stripes(70_000, 300), torch.rand(70_000) < 0.4, torch.rand(200_000) < 0.03,
    torch.rand(1025) < 0.5, torch.tensor(True),
], ids=["all", "runs", "bits", "offsets", "edge", "scalar"])  # fmt: skip
@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("grad_scale, maximize, amsgrad", [(1.0, False, False), (8.0, True, True)])
def test_the_operator_against_its_reference(dtype, mask, beta1, grad_scale, maximize, amsgrad):
    ours = problem(mask, dtype, amsgrad)
    theirs, before = clone(ours), ours[0].clone()
    scalars = SCALARS | dict(beta1=beta1, grad_scale=grad_scale, maximize=maximize)
    torch.ops.talos_fast.masked_adam_(*ours, **scalars)
    masked_adam_reference(*theirs, **scalars)
    assert torch.equal(ours[0][~mask], before[~mask])
    for got, want in zip(ours, theirs, strict=True):
        if got is not None and got.is_floating_point():
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("density", [1.1, 0.4, 0.02])
def test_opcheck(density):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    scalars = SCALARS | dict(grad_scale=1.0, maximize=False)
    arguments = problem(random_mask(3000, density), torch.float32)
    torch.library.opcheck(torch.ops.talos_fast.masked_adam_.default, arguments, scalars)


SPOILED = {
    "must have the dtype of param": lambda a: [a[0], a[1].double(), *a[2:]],
    "grad has 2999 entries, param 3000": lambda a: [a[0], a[1][1:], *a[2:]],
    "param and grad must be contiguous": lambda a: [a[0], torch.randn(6000)[::2], *a[2:]],
    "exp_avg_sq must be contiguous with": lambda a: [*a[:3], a[3][1:], *a[4:]],
    "exp_avg must be float64 for float64 parameters, else float32": lambda a: [*a[:2], a[2].double(), *a[3:]],
    "four columns": lambda a: [*a[:6], a[6][:, :3].contiguous(), a[7]],
    "index must be uint8": lambda a: [*a[:7], a[7].float()],
    "row 0 of work leaves the parameter": lambda a: [*a[:6], a[6] + 4096, a[7]],
}


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("text", SPOILED)
def test_the_operator_refuses_stray_memory(text):
    arguments = problem(random_mask(3000, 0.4), torch.float32)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.talos_fast.masked_adam_(*SPOILED[text](arguments), **SCALARS, grad_scale=1.0, maximize=False)


def test_channels_last_weights_step_as_they_lie():
    torch.manual_seed(0)
    start, mask = torch.randn(8, 16, 3, 3), random_mask((8, 16, 3, 3), 0.5)
    weights = [torch.nn.Parameter(start.clone(memory_format=layout)) for layout in
               (torch.channels_last, torch.contiguous_format)]  # fmt: skip
    for p in weights:
        optimizer = MaskedAdam([p], masks=[mask])
        for step in range(3):
            torch.manual_seed(step)
            p.grad = torch.randn(8, 16, 3, 3)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0][~mask], start[~mask])
