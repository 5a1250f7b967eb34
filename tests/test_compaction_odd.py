"""Compaction and rows where they begin, end and change: other masks, calls in between, what is frozen or empty."""

import math

import pytest
import torch
from adam_cases import backward, drawn, linear
from torch import nn

from talos_fast import MaskedAdam, TalosError
from talos_fast.optim.compact_gradient import CompactGradient


def test_the_last_compaction_counts():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    first = optimizer.compact_gradients()
    optimizer.compact_gradients(norm="all")
    backward(net)
    assert first.removed and optimizer.clip_grad_norm_(1.0) == 4  # of sixteen ones
    assert len(net.weight._post_accumulate_grad_hooks) == 1


def test_a_context_that_was_made_before_the_compaction_makes_no_dense_gradient_either():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    rows = optimizer.selected_rows()
    optimizer.compact_gradients()
    dense = []
    net.weight.register_post_accumulate_grad_hook(dense.append)  # what comes past autograd calls none
    with rows:
        backward(net)
    assert isinstance(net.weight.grad, CompactGradient) and not dense


def test_rows_go_on_without_a_compaction_that_was_removed():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    handle = optimizer.compact_gradients()
    with optimizer.selected_rows():
        backward(net)
        handle.remove()
        net.weight.grad = None
        backward(net)
    assert torch.equal(net.weight.grad[mask], torch.ones(int(mask.sum())))


def test_parameters_that_are_added_are_compacted():
    (net, mask), (other, _) = linear(), linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients()
    optimizer.add_param_group({"params": [other.weight], "masks": [mask]})
    backward(other)
    assert isinstance(other.weight.grad, CompactGradient)


def test_entries_of_other_masks_are_not_added_up():
    net, _ = linear()
    mask = torch.arange(4)[:, None].expand(4, 4) < 2  # as many entries as the other half
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients()
    with optimizer.selected_rows():
        backward(net)
    optimizer.set_masks([~mask])
    with pytest.raises(TalosError, match="for another mask"), optimizer.selected_rows():
        backward(net)


def test_a_step_counts_passes_anew_though_the_model_clears_the_gradients():
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients(norm="all", accumulate=2)
    backward(net)
    optimizer.step()
    net.zero_grad()  # of which the optimizer hears nothing
    for _ in range(2):
        backward(net)
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(8.0)


@pytest.mark.parametrize("empty", ["weight", "bias"])
def test_what_has_no_selected_entry_gets_no_gradient_from_rows(empty):
    net = nn.Linear(4, 4)
    masks = {name: drawn(*p.shape) > 0 for name, p in net.named_parameters()}
    masks[empty][:] = False
    optimizer = MaskedAdam(net.named_parameters(), masks=masks)
    optimizer.compact_gradients()
    with optimizer.selected_rows():
        net(torch.ones(1, 4)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == [empty]


@pytest.mark.parametrize("compact", [False, True])
def test_frozen_weights_with_a_mask_get_no_gradient_from_rows(compact):
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    if compact:
        optimizer.compact_gradients()
    net.weight.requires_grad_(False)
    with optimizer.selected_rows():
        net(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert net.weight.grad is None


@pytest.mark.parametrize("norm", ["all", "selected"])
@pytest.mark.parametrize("use", [
    lambda p: nn.utils.clip_grad_norm_(p, 1.0, norm_type=math.inf),
    lambda p: p.grad.add_(torch.ones(4, 4), alpha=2),
], ids=["another norm", "a multiple"])  # fmt: skip
def test_what_would_be_wrong_of_selected_entries_is_refused(use, norm):
    net, mask = linear()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients(norm=norm)
    backward(net)
    with pytest.raises(TalosError, match="compacted gradient"):
        use(net.weight)


def test_a_whole_norm_beyond_what_fp16_holds():
    p = nn.Parameter(torch.ones(16, dtype=torch.float16))
    optimizer = MaskedAdam([p], masks=[torch.arange(16) < 5])
    optimizer.compact_gradients(norm="all")
    (p * 30_000).sum().backward()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), torch.tensor(120_000.0))


def test_a_grad_scaler_unscales_compact_and_dense_gradients_of_two_dtypes(device):
    net = nn.Linear(4, 4).to(device, torch.bfloat16)
    optimizer = MaskedAdam(net.named_parameters(), masks={"weight": drawn(4, 4) > 0})
    optimizer.compact_gradients()
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    scaler.scale(net(torch.ones(1, 4, dtype=torch.bfloat16, device=device)).sum()).backward()
    scaler.unscale_(optimizer)
    assert net.bias.grad.tolist() == [1.0] * 4 and set(net.weight.grad.values.tolist()) == {1.0}


def halves() -> tuple[nn.Linear, torch.Tensor]:
    """A layer, and a mask of its first two rows of four."""
    return linear()[0], torch.arange(4)[:, None].expand(4, 4) < 2


def test_the_norm_of_all_entries_is_of_the_rows_that_are_computed():
    net, mask = halves()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients(norm="all")
    with optimizer.selected_rows():
        backward(net)
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(8**0.5)


def test_rows_of_a_bf16_weight_are_added_up_in_fp32():
    net, mask = halves()
    net.to(torch.bfloat16)
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients()
    with optimizer.selected_rows():
        for size in (256.0, 1.0):
            net(torch.full((1, 4), size, dtype=torch.bfloat16)).sum().backward()
    assert net.weight.grad.values.dtype is torch.float32 and net.weight.grad.values.tolist() == [257.0] * 8


def test_a_whole_norm_does_not_outlive_entries_that_rows_add():
    net, mask = halves()
    optimizer = MaskedAdam([net.weight], masks=[mask])
    optimizer.compact_gradients(norm="all")
    backward(net)
    optimizer.compact_gradients()
    with optimizer.selected_rows():
        backward(net)
    with pytest.raises(TalosError, match="sum of 2 backward passes"):
        optimizer.clip_grad_norm_(1.0)


def test_no_pass_a_step_is_refused():
    with pytest.raises(TalosError, match="accumulate=0: a step takes at least one"):
        MaskedAdam([nn.Parameter(torch.ones(2))]).compact_gradients(accumulate=0)
