"""What happens around an optimizer in long-lived programs: other defaults and layouts, frozen and given-up things."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adam_cases import CLOSE_ON, backward, device_of, drawn, launches, linear
from torch import nn
from torch.optim import AdamW

from talos_fast import Mask, MaskedAdam, TalosError
from talos_fast.optim import to_adamw
from talos_fast.optim.compact_gradient import CompactGradient


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_the_same_under_another_default_dtype(default, place):
    start, mask = drawn(40), drawn(40, seed=1) > 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        p, q = (nn.Parameter(start.to(device_of(place), copy=True)) for _ in range(2))
        optimizer, oracle = MaskedAdam([p], lr=1e-2, masks=[mask]), AdamW([q], lr=1e-2)
        for number in range(3):
            p.grad = drawn(40, seed=2 + number).to(p.device)
            q.grad = p.grad.clone()
            optimizer.step()
            oracle.step()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(p[mask], q[mask], **CLOSE_ON[place])
    assert torch.equal(p[~mask].cpu(), start[~mask])


def test_a_default_device_reaches_nothing():
    p, mask = nn.Parameter(drawn(20)), drawn(20, seed=1) > 0
    optimizer = MaskedAdam([p], masks=[mask])
    p.grad = drawn(20, seed=2)
    optimizer.step()
    with torch.device("meta"):
        optimizer.step()
        MaskedAdam([p], masks=[mask]).load_state_dict(optimizer.state_dict())
        with pytest.raises(TalosError, match="another mask"):
            MaskedAdam([p], masks=[~mask]).load_state_dict(optimizer.state_dict())


CARRIED = {
    "kept": lambda net, optimizer, mask: (net, optimizer),
    "deepcopy": lambda net, optimizer, mask: copy.deepcopy((net, optimizer)),
    "pickle": lambda net, optimizer, mask: pickle.loads(pickle.dumps((net, optimizer))),
    "same masks": lambda net, optimizer, mask: optimizer.set_masks([mask]) or (net, optimizer),
    "no masks and back": lambda net, optimizer, mask: (
        optimizer.set_masks({}) or optimizer.set_masks([mask]) or (net, optimizer)
    ),
}


@pytest.mark.parametrize("how", CARRIED)
def test_moments_stay_with_their_entries_when_the_layout_changes(how, place):
    weight, mask = nn.Parameter(drawn(4, 4, 3, 3).to(device_of(place))), drawn(4, 4, 3, 3, seed=1) > 0
    net = nn.ParameterList([weight])
    twin = nn.Parameter(weight.detach().clone())
    optimizer, oracle = MaskedAdam([weight], lr=0.1, masks=[mask]), AdamW([twin], lr=0.1)
    weight.data = weight.data.to(memory_format=torch.channels_last)  # after the optimizer has counted the entries
    for number in range(4):
        if number == 2:
            net, optimizer = CARRIED[how](net, optimizer, mask)
        net[0].grad, twin.grad = (drawn(4, 4, 3, 3, seed=2 + number).to(twin.device) for _ in range(2))
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(net[0][mask], twin[mask], **CLOSE_ON[place])
    moments = to_adamw(optimizer.state_dict())["state"][0]["exp_avg"]
    torch.testing.assert_close(moments[mask], oracle.state[twin]["exp_avg"][mask], **CLOSE_ON[place])


def test_a_model_that_the_mask_has_frozen_can_be_compacted():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    masks["0.weight"][0] = True
    Mask(masks).freeze(net)
    optimizer = MaskedAdam(net.named_parameters(), masks=masks)
    handle = optimizer.compact_gradients()
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.weight"]
    net[1].weight.requires_grad_()
    net(torch.ones(1, 4)).sum().backward()
    assert isinstance(net[0].weight.grad, CompactGradient) and isinstance(net[1].weight.grad, CompactGradient)
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_a_handle_outlives_a_change_of_masks():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    handle = optimizer.compact_gradients()
    optimizer.set_masks([~mask])
    backward(net)
    assert net.weight.grad.selection.count == int((~mask).sum())
    handle.active, net.weight.grad = False, None
    optimizer.set_masks([mask])
    backward(net)
    assert not isinstance(net.weight.grad, CompactGradient)
    handle.active, net.weight.grad = True, None
    handle.remove()
    optimizer.set_masks([~mask])
    backward(net)
    assert not isinstance(net.weight.grad, CompactGradient)


def test_what_is_not_active_compacts_nothing_and_sums_stay_right():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    handle = optimizer.compact_gradients()
    handle.active = False
    with optimizer.selected_rows():
        backward(net)
    assert not isinstance(net.weight.grad, CompactGradient)
    net.weight.grad = None
    backward(net)
    handle.active = True
    with optimizer.selected_rows():
        backward(net)
    assert net.weight.grad.values.tolist() == [2.0] * int(mask.sum())


@pytest.mark.parametrize("compact", [False, True])
def test_a_context_that_is_kept_knows_the_new_masks(compact):
    net, _ = linear()
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True  # rows that only one of the two masks has
    optimizer = MaskedAdam([net.weight], lr=0.1, weight_decay=0.0, masks=[mask])
    rows = optimizer.selected_rows()
    if compact:
        optimizer.compact_gradients()
    optimizer.set_masks([~mask])
    before = net.weight.detach().clone()
    with rows:
        backward(net)
    optimizer.step()
    assert torch.equal(net.weight != before, ~mask)


def test_a_pending_gradient_of_other_masks_is_refused_by_name():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients()
    backward(net)
    with pytest.raises(TalosError, match="by another optimizer, or for another mask"):
        MaskedAdam(net.parameters()).step()
    optimizer.set_masks({})
    with pytest.raises(TalosError, match="by another optimizer, or for another mask"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [None, True, False])
def test_a_scalar_without_a_mask_is_clipped_in_its_own_dtype(fused, dtype, place):
    w = nn.Parameter(torch.ones(4, dtype=dtype, device=device_of(place)))
    s, t = (nn.Parameter(torch.full((), 2.0, dtype=dtype, device=device_of(place))) for _ in range(2))
    optimizer = MaskedAdam([w, s], lr=0.1, masks={w: torch.tensor([True, False, True, False])}, fused=fused)
    oracle = AdamW([t], lr=0.1, fused=False)
    w.grad, s.grad = torch.ones_like(w), torch.full_like(s, 3.0)
    norm = optimizer.clip_grad_norm_(1.0)
    t.grad = (s.grad / norm).to(dtype)
    optimizer.step()
    oracle.step()
    torch.testing.assert_close(s, t)


def test_parameters_of_two_precisions_are_clipped_by_one_norm(place):
    pairs = [
        [nn.Parameter(torch.ones(4, dtype=dtype, device=device_of(place))) for dtype in (torch.float32, torch.float64)]
        for _ in range(2)
    ]
    ours = MaskedAdam(pairs[0], eps=1.0, masks={pairs[0][0]: torch.ones(4) > 0})
    for p in (*pairs[0], *pairs[1]):
        p.grad = torch.full_like(p, 3.0)
    norm = ours.clip_grad_norm_(1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(pairs[1], 1.0))
    ours.step()
    AdamW(pairs[1], eps=1.0).step()
    torch.testing.assert_close(pairs[0][0], pairs[1][0], **CLOSE_ON[place])
    torch.testing.assert_close(pairs[0][1], pairs[1][1], rtol=1e-12, atol=0)


def test_half_precision_state_goes_on_in_full_precision(place):
    def mixed() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(device_of(place))
        net[0].to(torch.bfloat16)
        return net

    net = mixed()
    masks = {name: torch.ones_like(p, dtype=torch.bool).cpu() for name, p in net.named_parameters()}
    masks["0.weight"][0] = False
    optimizer = MaskedAdam(net.named_parameters(), masks=masks)
    for step in range(2):
        if step:
            net.float()
        for number, p in enumerate(net.parameters()):
            p.grad = drawn(*p.shape, seed=10 * step + number).to(p)
        optimizer.step()
    fresh = MaskedAdam((wide := mixed().float()).named_parameters(), masks=masks)
    fresh.load_state_dict(optimizer.state_dict())
    assert not any("master" in fresh.state[p] for p in wide.parameters())
    for number, p in enumerate(wide.parameters()):
        p.grad = drawn(*p.shape, seed=number).to(p)
    fresh.step()


@pytest.mark.parametrize("fused", [None, False])
def test_a_graph_that_outlived_a_step_is_not_differentiated(fused, place):
    w = nn.Parameter(drawn(4, 4).to(device_of(place)))
    optimizer = MaskedAdam([w], lr=0.1, masks=[drawn(4, 4, seed=1) > 0], fused=fused)
    loss = (w @ w).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_passes_are_counted_from_the_last_step_or_reset(accumulate, set_to_none):
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients(norm="all", accumulate=accumulate)
    whole = 4.0 * accumulate  # of sixteen ones, added up
    for given_up in (True, False, False):
        for _ in range(accumulate - given_up):
            backward(net)
        if not given_up:
            assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(whole)
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        if not given_up:  # zeros are dense only where a sum is still to be made
            assert isinstance(net.weight.grad, CompactGradient) == (accumulate == 1 and not set_to_none)


def test_a_bias_that_broadcasts_has_its_whole_gradient():
    weight, bias = nn.Parameter(drawn(6, 4)), nn.Parameter(torch.zeros(1))
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[1:3] = True
    optimizer = MaskedAdam([weight, bias], masks=[mask, torch.ones(1, dtype=torch.bool)])
    with optimizer.selected_rows():
        F.linear(drawn(3, 4, seed=1), weight, bias).sum().backward()
    assert bias.grad.item() == 18


@pytest.mark.parametrize("masks", [[None], {0: torch.ones(4, dtype=torch.bool)}, [[True] * 4]])
def test_what_is_no_mask_is_refused_and_leaves_no_group(masks):
    optimizer = MaskedAdam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(TalosError, match="mask of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(4))], "masks": masks})
    assert len(optimizer.param_groups) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("way", [("cpu", "cuda"), ("cuda", "cpu")], ids=" to ".join)
def test_a_model_may_be_moved_after_its_optimizer_was_made(way, compact):
    nets, optimizers = [], []
    for made_on in way:
        net, mask = linear()
        net.to(made_on)
        optimizers.append(MaskedAdam(net.named_parameters(), lr=0.1, masks={"weight": mask}))
        nets.append(net.to(way[1]))
        if compact:
            optimizers[-1].compact_gradients()
        for _ in range(2):
            with optimizers[-1].selected_rows():
                net(torch.ones(2, net.in_features, device=way[1])).square().sum().backward()
            optimizers[-1].clip_grad_norm_(1.0, entries="selected")
            optimizers[-1].step()
            optimizers[-1].zero_grad()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)


def test_a_group_of_adams_is_refused():
    """Its decay goes into the gradient, which AdamW does for such a group and this optimizer never."""
    adam = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    assert adam.param_groups[0]["decoupled_weight_decay"] is False
    with pytest.raises(TalosError, match="decoupled_weight_decay=False"):
        MaskedAdam(adam.param_groups)


def test_state_ends_with_the_last_selected_entry_and_begins_anew(place):
    net, mask = linear(place)
    optimizer = MaskedAdam([net.weight], masks=[mask])
    for chosen in (mask, torch.zeros_like(mask), mask):
        optimizer.set_masks([chosen])
        backward(net)
        optimizer.step()
        assert bool(optimizer.state.get(net.weight)) == bool(chosen.any())
    assert optimizer.state[net.weight]["step"] == 1


def test_strided_gradients_without_masks(place):
    p, q = (nn.Parameter(torch.ones(3, 4, device=device_of(place))) for _ in range(2))
    p.grad = q.grad = drawn(4, 3).to(p.device).t()
    MaskedAdam([p]).step()
    AdamW([q]).step()
    torch.testing.assert_close(p, q)


def test_a_graph_of_what_did_not_step_can_be_differentiated(place):
    w, v = (nn.Parameter(drawn(4, 4).to(device_of(place))) for _ in range(2))
    optimizer = MaskedAdam([w, v], lr=0.1, masks=[drawn(4, 4, seed=1) > 0] * 2)
    for p in (w, v):
        p.grad = torch.ones_like(p)
    optimizer.step()
    loss = (w @ w).square().sum()
    w.grad = None
    optimizer.step()
    loss.backward()


def test_counters_of_another_dtype_are_counted_on(place):
    """As AdamW makes them under another default dtype."""
    p = nn.Parameter(torch.ones(4, device=device_of(place)))
    optimizer = MaskedAdam([p], masks=[torch.ones(4) > 0])
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["step"] = optimizer.state[p]["step"].double()
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2.0
    torch.testing.assert_close(p, torch.full_like(p, (1 - 1e-5) * ((1 - 1e-5) - 1e-3) - 1e-3))


def test_a_weight_without_a_mask_is_laid_out_anew_under_its_moments(place):
    p, q = (nn.Parameter(drawn(4, 4, 3, 3).to(device_of(place))) for _ in range(2))
    optimizers = MaskedAdam([p], lr=0.1), AdamW([q], lr=0.1)
    for number in range(3):
        if number == 1:
            p.data = p.data.to(memory_format=torch.channels_last)
        p.grad, q.grad = (drawn(4, 4, 3, 3, seed=number).to(p.device) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, q, **CLOSE_ON[place])


def test_moments_of_two_dtypes_are_refused_as_in_torch(place):
    if place == "cuda":
        pytest.skip("torch may find it out on the device only")
    for kind in (MaskedAdam, AdamW):
        p = nn.Parameter(torch.ones(4, device=device_of(place)))
        optimizer = kind([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].bfloat16()
        with pytest.raises(RuntimeError, match="dtype"):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_that_gets_a_mask_goes_on_in_full_precision(dtype, place):
    p = nn.Parameter(torch.ones(4, dtype=dtype, device=device_of(place)))
    optimizer = MaskedAdam([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    start = float(p.detach()[0])
    optimizer.set_masks([torch.arange(4) < 2])
    for _ in range(30):
        optimizer.step()
    state = optimizer.state[p]
    assert all(state[key].dtype is torch.float32 for key in ("exp_avg", "exp_avg_sq", "master"))
    torch.testing.assert_close(state["master"], torch.full_like(state["master"], start - 30e-4), rtol=1e-4, atol=0)


def test_what_is_not_to_be_fused_is_not_launched(place):
    p = nn.Parameter(torch.ones(4, device=device_of(place)))
    optimizer = MaskedAdam([p], fused=False)
    p.grad = torch.ones_like(p)
    for fused in (False, None, False):
        optimizer.param_groups[0]["fused"] = fused
        optimizer.step()
        assert bool(launches(optimizer)) == (fused is None and place != "cpu")
