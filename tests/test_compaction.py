"""compact_gradients: the same training with gradients kept only where selected, and the memory that this frees."""

import itertools

import pytest
import torch
from compaction_cases import assert_same, masks, pair
from torch import nn

from talos_fast import MaskedAdam, TalosError
from talos_fast.optim.compact_gradient import CompactGradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_the_selected_entries(dtype):
    nets, _ = pair(dtype=dtype)
    for batch in range(3):
        before = {n: None if p.grad is None else p.grad.clone() for n, p in nets[1].named_parameters()}
        for net in nets:
            net.loss(batch).backward()
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            mask = masks(nets[0]).get(name)
            if mask is None:
                assert torch.equal(p.grad, q.grad)
                continue
            order = (0, 2, 3, 1) if p.dim() == 4 else range(p.dim())
            assert isinstance(p.grad, CompactGradient)
            assert (p.grad.shape, p.grad.stride()) == (p.shape, p.stride())
            want = q.grad.permute(*order)[mask.permute(*order)]
            assert p.grad.values.dtype is torch.promote_types(dtype, torch.float32)
            if dtype is not torch.bfloat16:
                assert torch.equal(p.grad.values, want)
            elif before[name] is None:  # from there on the sums are fp32, not bf16
                assert torch.equal(p.grad.values, want.float())


@pytest.mark.parametrize("entries", ["all", "selected", None])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [None, False, True])
def test_training_is_the_same(entries, set_to_none, fused):
    nets, optimizers = pair(norm=entries or "selected", fused=fused)
    for batch in range(4):
        norms = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.loss(batch).backward()
            if entries:
                norms.append(optimizer.clip_grad_norm_(0.05, entries))
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        if entries:
            torch.testing.assert_close(*norms)
    assert_same(nets)


@pytest.mark.parametrize("entries", ["all", "selected"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_accumulation_clipping_and_a_grad_scaler_together(fused, unscale, entries):
    nets, optimizers = pair(norm=entries, accumulate=3, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in nets]
    for step in range(4):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            for batch in range(3):
                factor = float("inf") if step == 1 and batch == 2 else 1.0
                scaler.scale(net.loss(batch) * factor / 3).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if unscale or fused:
                optimizer.clip_grad_norm_(0.05, entries)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == [1024.0, 512.0, 512.0, 1024.0][step]
    assert_same(nets)


@pytest.mark.parametrize("norm", ["all", "selected"])
def test_torchs_own_clipping_takes_the_norm_that_is_kept(norm):
    nets, optimizers = pair(norm=norm)
    for net in nets:
        net.loss().backward()
    norms = [torch.nn.utils.clip_grad_norm_(nets[0].parameters(), 0.05), optimizers[1].clip_grad_norm_(0.05, norm)]
    torch.testing.assert_close(*norms)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(nets)


def test_the_norm_over_all_entries_of_a_sum_is_refused():
    (net, _), (optimizer, _) = pair(norm="all")
    net.loss().backward()
    net.loss(1).backward()
    with pytest.raises(TalosError, match="sum of 2 backward passes, whose norm over all entries is not known"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.clip_grad_norm_(1.0, "selected")
    optimizer.zero_grad(set_to_none=False)
    net.loss().backward()
    optimizer.clip_grad_norm_(1.0)
    (net, _), (optimizer, _) = pair(norm="selected")
    net.loss().backward()
    with pytest.raises(TalosError, match="pass norm='all' to compact_gradients"):
        optimizer.clip_grad_norm_(1.0)


def peak_bytes(run) -> int:
    """Of what torch allocates on the CPU while it runs, the most that lived at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def test_dense_gradients_never_coexist():
    layers, width = 8, 256
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    mask = torch.zeros(width, width, dtype=torch.bool)
    mask[: width // 2] = torch.rand(width // 2, width) < 0.2
    optimizer = MaskedAdam(net.parameters(), masks=[mask] * layers)
    weight, kept, x = 4 * width**2, 4 * int(mask.sum()), torch.randn(2, width)

    def backward() -> None:
        net(x).square().mean().backward()
        optimizer.zero_grad()

    def on_rows() -> None:
        with optimizer.selected_rows():
            backward()

    slack = weight // 8  # activations
    assert layers * weight <= peak_bytes(backward) <= layers * weight + slack
    optimizer.compact_gradients()
    assert peak_bytes(backward) <= layers * kept + weight + slack
    assert peak_bytes(on_rows) <= layers * kept + weight // 2 + slack
