"""clip_grad_norm_ against torch's own: the same norm, the same step, and no gradient rewritten."""

import math

import pytest
import torch

from talos_fast import MaskedAdam, TalosError
from talos_fast.optim.clip import Clip

SHAPES = [(50, 20), (7,), (5,), (30,)]
BACKENDS = [{}, {"fused": False}, {"foreach": True}, {"fused": True}]


def setup(dtype: torch.dtype = torch.float32, factor: float = 1.0):
    """Parameters with gradients, and masks of which one is empty and one missing."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p) * factor
    masks = [torch.rand(shape) < 0.4 for shape in SHAPES[:3]]
    masks[2][:] = False
    return params, masks


def optimizer(params, masks, **kwargs):
    return MaskedAdam([{"params": params[:3], "masks": masks}, {"params": params[3:]}], lr=0.1, eps=1e-2, **kwargs)


def selected(params, masks):
    return [*(p.grad[mask] for p, mask in zip(params, masks, strict=False)), params[3].grad]


def stepped(params, masks, max_norm, entries="all", **kwargs):
    ours = optimizer(params, masks, **kwargs)
    norm = ours.clip_grad_norm_(max_norm, entries=entries)
    ours.step()
    return norm


@pytest.mark.parametrize("kwargs", BACKENDS, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e4, 0.0, math.inf])
def test_all_entries_clip_as_torch(kwargs, max_norm):
    (ours, masks), (theirs, _) = setup(), setup()
    before = [p.grad.clone() for p in ours]
    norm = stepped(ours, masks, max_norm, **kwargs)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    optimizer(theirs, masks, **kwargs).step()
    for p, q, grad in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_selected_entries(dtype):
    (ours, masks), (theirs, _) = setup(dtype), setup(dtype)
    want = torch.cat([g.double().flatten() for g in selected(theirs, masks)]).norm()
    norm = stepped(ours, masks, 0.5, "selected")
    assert norm.dim() == 0 and norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0)
    for p in theirs:
        p.grad = (p.grad.double() * (0.5 / (want + 1e-6))).to(dtype)
    optimizer(theirs, masks).step()
    for p, q in zip(ours, theirs, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(p, q, rtol=4 * eps, atol=eps / 10)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("entries", ["all", "selected"])
def test_what_is_not_finite_behaves_as_in_torch(bad, entries):
    (ours, masks), (theirs, _) = setup(), setup()
    masks[0][0, 0] = True
    for params in (ours, theirs):
        params[0].grad[0, 0] = bad
    with pytest.raises(RuntimeError, match="total norm of order 2.0 for gradients from `parameters` is non-finite"):
        optimizer(ours, masks).clip_grad_norm_(1.0, entries, error_if_nonfinite=True)
    norm = stepped(ours, masks, 1.0, entries)
    assert torch.equal(norm.isnan(), torch.nn.utils.clip_grad_norm_(theirs, 1.0).isnan())
    optimizer(theirs, masks).step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


def test_a_clip_serves_one_step_and_zero_grad_forgets_it():
    (ours, masks), (theirs, _) = setup(), setup()
    clipped, plain = optimizer(ours, masks), optimizer(theirs, masks)
    clipped.clip_grad_norm_(1e-3)
    clipped.zero_grad(set_to_none=False)
    for p, q in zip(ours, theirs, strict=True):
        p.grad.copy_(q.grad)
    clipped.step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    clipped.clip_grad_norm_(1e-3)
    clipped.step()
    assert clipped._divisor() is None


def test_the_last_clip_counts():
    (ours, masks), (theirs, _) = setup(), setup()
    twice, once = optimizer(ours, masks), optimizer(theirs, masks)
    assert torch.equal(twice.clip_grad_norm_(1e-3), twice.clip_grad_norm_(0.5))
    once.clip_grad_norm_(0.5)
    twice.step()
    once.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fused, unscale", [(None, True), (True, True), (True, False)])
@pytest.mark.parametrize("entries", ["all", "selected"])
def test_under_a_grad_scaler(fused, unscale, entries):
    (ours, masks), (theirs, _) = setup(factor=8.0), setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))  # starts it
    scaled = optimizer(ours, masks, fused=fused)
    if unscale:
        scaler.unscale_(scaled)
    norm = scaled.clip_grad_norm_(0.5, entries) / (1 if unscale else 8)
    scaler.step(scaled)
    torch.testing.assert_close(norm, stepped(theirs, masks, 0.5, entries, fused=fused))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_low_precision_gradients_is_float32(dtype):
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = torch.ones_like(p)
    norm = MaskedAdam([p]).clip_grad_norm_(1.0)
    assert norm.dtype is torch.float32 and norm == 2


def test_without_gradients_the_norm_is_zero():
    params, masks = setup()
    for p in params:
        p.grad = None
    assert optimizer(params, masks).clip_grad_norm_(1.0).item() == 0.0


@pytest.mark.parametrize("arguments, message", [
    ((-1.0,), "max_norm=-1.0: the largest norm must be zero or positive"),
    ((math.nan,), "max_norm=nan"),
    ((1.0, "some"), "entries='some': choose 'all' or 'selected'"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(TalosError, match=message):
        optimizer(*setup()).clip_grad_norm_(*arguments)


def test_a_scale_of_another_device_follows_the_norm():
    norm, scale = torch.ones((), device="meta"), torch.ones(1)  # torch itself would move a number without dimensions
    assert Clip(norm, 1.0).divisor(scale).device.type == "meta"
