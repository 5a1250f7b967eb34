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
    on_cpu,
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


@pytest.mark.parametrize("given_masks", [masks(), None], ids=["masked", "dense"])
def test_infinities_that_two_devices_found_skip_one_step(place, given_masks):
    """GradScaler gives their number: 2 is no more than an overflow."""
    skipped, plain = parameters(place=place), parameters(place=place)
    optimizer = MaskedAdam(skipped, masks=given_masks)
    for found in (2.0, 0.0, 2.0, 0.0):
        optimizer.found_inf = torch.tensor(found, device=device_of(place))
        run(optimizer, skipped, [int(found)])
    run(MaskedAdam(plain, masks=given_masks), plain, [0, 0])
    assert float(optimizer.state[skipped[0]]["step"]) == 2.0
    assert all(torch.equal(p, q) for p, q in zip(skipped, plain, strict=True))


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


@pytest.mark.gpu
def test_a_scale_and_an_overflow_of_another_device_are_read_there():
    scaled, plain = parameters(place="cuda"), parameters(place="cuda")
    optimizer = MaskedAdam(scaled, masks=masks(), fused=True)
    optimizer.grad_scale = torch.tensor(4.0)
    for step, found in enumerate((0.0, 1.0)):
        optimizer.found_inf = torch.tensor(found)
        give_gradients(scaled, step, 4.0)
        optimizer.step()
    run(MaskedAdam(plain, masks=masks(), fused=True), plain, range(1))
    assert all(torch.equal(p, q) for p, q in zip(scaled, plain, strict=True))


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


@pytest.mark.parametrize("density", [0.5, 0.03], ids=["bits", "offsets"])
def test_compact_gradients_of_many_blocks_step_as_dense_ones(place, density):
    """Where a block's first element is not its first compact entry."""
    mask = torch.rand(70_000) < density
    dense, compact = (torch.nn.Parameter(torch.ones(70_000, device=device_of(place))) for _ in range(2))
    dense.grad = compact.grad = torch.randn(70_000).to(dense.device)
    ours, reference = (MaskedAdam([p], masks=[mask]) for p in (compact, dense))
    ours._gradient = lambda p: p.grad[mask.to(p.device)]  # what compaction returns
    ours.step()
    reference.step()
    assert_stepped_by(ours, place)
    assert torch.equal(dense, compact)


def test_compact_gradients_of_two_precisions_step_as_if_apart(place):
    """The gradients are fp32 all, their parameters not."""
    mask = torch.arange(6) % 2 == 0
    values = [torch.ones(6, dtype=dtype, device=device_of(place)) for dtype in (torch.bfloat16, torch.float32)]
    together, apart = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    for params in (together, *([p] for p in apart)):
        optimizer = MaskedAdam(params, lr=0.1, masks=[mask] * len(params))
        optimizer._gradient = lambda p: torch.ones(3, device=p.device)  # what compaction returns
        optimizer.step()
        assert_stepped_by(optimizer, place)
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))
    assert torch.equal(on_cpu(together[1]) == 1, ~mask)


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
