"""What gradients are divided by, and in which form they come: scaled, clipped, accumulated, compact."""

import pytest
import torch
from adam_cases import (
    CLOSE,
    CLOSE_ON,
    assert_same_on_selected,
    assert_stepped_by,
    device_of,
    give_gradients,
    masks,
    parameters,
    run,
)
from torch.optim import AdamW

from talos_fast import MaskedAdam
from talos_fast.optim.clip import Clip


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_grad_scaler_skips_overflows(place, options, amsgrad):
    """Every step whose gradients are finite is AdamW's; the others change nothing, the count of steps included."""
    masked, dense = parameters(place=place), parameters(place=place)
    for optimizer, params in (
        (MaskedAdam(masked, masks=masks(), amsgrad=amsgrad, **options), masked),
        (AdamW(dense, amsgrad=amsgrad, **options), dense),
    ):
        scaler = torch.amp.GradScaler(device_of(place), init_scale=8.0)
        for step, factor in enumerate((1.0, float("inf"), 1.0)):
            scale = scaler.scale(torch.ones((), device=device_of(place)))
            give_gradients(params, step, factor * float(scale))
            scaler.step(optimizer)
            scaler.update()
        assert float(optimizer.state[params[0]]["step"]) == 2.0
    assert_same_on_selected(masked, dense, place)


@pytest.mark.parametrize("fused", [None, True, False])
def test_what_has_no_mask_skips_overflows(place, fused):
    p = torch.nn.Parameter(torch.ones(4, device=device_of(place)))
    p.grad = torch.ones_like(p)
    optimizer = MaskedAdam([p], fused=fused)
    optimizer.found_inf = torch.tensor(1.0, device=device_of(place))
    optimizer.step()
    assert (p == 1).all()


def test_scales_are_multiplied_and_clipping_is_consumed(place):
    """A step on gradients divided by GradScaler's scale and by that of clipping; the next divides by neither."""
    scaled, plain = parameters(place=place), parameters(place=place)
    optimizer = MaskedAdam(scaled, masks=masks(), fused=True)
    give_gradients(scaled, 0, 12.0)
    optimizer.grad_scale = torch.tensor(4.0, device=device_of(place))
    optimizer.found_inf = torch.tensor(0.0, device=device_of(place))
    optimizer._clip = Clip(torch.tensor(12e3, device=device_of(place)), 1e3)  # of gradients that are still scaled
    optimizer.step()
    assert optimizer._clip is None
    del optimizer.grad_scale, optimizer.found_inf
    run(optimizer, scaled, [1])
    run(MaskedAdam(plain, masks=masks(), fused=True), plain, range(2))
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("given_masks", [masks(), None], ids=["masked", "dense"])
def test_clipping_divides_on_every_path(place, options, given_masks):
    clipped, plain = parameters(place=place), parameters(place=place)
    optimizer = MaskedAdam(clipped, masks=given_masks, **options)
    give_gradients(clipped, 0, 4.0)
    optimizer._clip = Clip(torch.tensor(4e3, device=device_of(place)), 1e3)
    optimizer.step()
    run(MaskedAdam(plain, masks=given_masks, **options), plain, range(1))
    assert all(torch.equal(p, q) for p, q in zip(clipped, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_gradients_step_as_dense_ones(place, dtype):
    dense, compact = parameters(dtype, place), parameters(dtype, place)
    places = [mask.to(p.device) for p, mask in zip(dense, masks(), strict=True)]
    ours = MaskedAdam(compact, masks=masks())
    selected = dict(zip(compact, places, strict=True))
    ours._gradient = lambda p: p.grad[selected[p]].float()  # what compaction returns
    reference = MaskedAdam(dense, masks=masks())
    run(reference, dense, range(3))
    run(ours, compact, range(3))
    assert_stepped_by(ours, place)
    for p, q in zip(dense, compact, strict=True):
        torch.testing.assert_close(p, q, **(CLOSE_ON[place] if dtype is torch.float32 else dict(rtol=2**-7, atol=1e-7)))
    del ours._gradient
    run(reference, dense, [3])
    run(ours, compact, [3])
    for p, q in zip(dense, compact, strict=True):
        torch.testing.assert_close(p, q, **(CLOSE_ON[place] if dtype is torch.float32 else dict(rtol=2**-7, atol=1e-7)))


def test_accumulated_gradients(place):
    masked, dense = parameters(place=place), parameters(place=place)
    for optimizer, params in ((MaskedAdam(masked, masks=masks()), masked), (AdamW(dense), dense)):
        for step in range(2):
            for part in range(3):
                torch.manual_seed(10 * step + part)
                sum((p * torch.randn(p.shape).to(p.device)).sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_on_selected(masked, dense, place)
