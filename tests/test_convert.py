"""MaskedAdam's state as AdamW's and back, under other masks, and through torch's distributed checkpoints."""

import copy

import pytest
import torch
from adam_cases import (
    CLOSE,
    CLOSE_ON,
    assert_stepped_by,
    copied,
    device_of,
    drawn,
    equal,
    masks,
    on_cpu,
    parameters,
    run,
    through_a_file,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW

from talos_fast import MaskedAdam, TalosError
from talos_fast.optim import from_adamw, to_adamw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_adamw_goes_on_as_adamw(dtype):
    """The oracle: AdamW with the converted state does to the selected entries what MaskedAdam goes on doing."""
    params = parameters(dtype)
    optimizer = MaskedAdam(params, masks=masks(), fused=False, amsgrad=True)
    run(optimizer, params, range(3))
    dense = [torch.nn.Parameter(p.detach().float()) for p in params]
    theirs = AdamW(dense, fused=False, amsgrad=True)
    theirs.load_state_dict(to_adamw(optimizer.state_dict()))
    for p, q, mask in zip(params, dense, masks(), strict=True):
        if "master" in optimizer.state[p]:
            q.data[mask] = optimizer.state[p]["master"]
        if q in theirs.state:
            assert not theirs.state[q]["exp_avg"][~mask].any() and theirs.state[q]["exp_avg"].shape == q.shape
    for step in range(3, 6):
        run(optimizer, params, [step])
        for p, q in zip(params, dense, strict=True):
            q.grad = p.grad.float()
        theirs.step()
    for p, q, mask in zip(params, dense, masks(), strict=True):
        if mask.any():
            assert torch.equal(p[mask], q[mask].to(dtype))
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"][mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [False, True])
def test_from_adamw_and_back(dtype, named):
    names = [f"p{n}" for n in range(5)]

    def given(params):
        return list(zip(names, params, strict=True)) if named else params

    wanted = dict(zip(names, masks(), strict=True)) if named else masks()
    dense = parameters(dtype)
    theirs = AdamW(given(dense), fused=False)
    run(theirs, dense, range(3))
    params = copied(dense)
    optimizer = MaskedAdam(given(params), masks=wanted, fused=False)
    optimizer.load_state_dict(from_adamw(theirs.state_dict(), wanted))
    back = to_adamw(optimizer.state_dict())["state"]
    for number, (p, mask) in enumerate(zip(dense, masks(), strict=True)):
        assert (number in back) == bool(mask.any())
        if mask.any():
            for key, value in theirs.state[p].items():
                if key != "step":
                    assert torch.equal(back[number][key], torch.where(mask, value, 0).float())
            assert float(back[number]["step"]) == 3.0
    if dtype is torch.float32:
        run(theirs, dense, range(3, 6))
        run(optimizer, params, range(3, 6))
        assert all(torch.equal(p[m], q[m]) for p, q, m in zip(params, dense, masks(), strict=True))


def test_from_adamw_takes_the_steps_of_old_checkpoints():
    params = parameters()
    run(optimizer := AdamW(params), params, range(3))
    saved = optimizer.state_dict()
    old = {**saved, "state": {n: {**state, "step": int(state["step"])} for n, state in saved["state"].items()}}
    found = from_adamw(old, masks())["state"]
    assert all(torch.equal(state["step"], saved["state"][number]["step"]) for number, state in found.items() if state)


def test_from_adamw_shares_no_count_of_steps_and_leaves_out_what_has_no_entry():
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    theirs = AdamW([p, q])
    run(theirs, [p, q], range(1))
    found = from_adamw(theirs.state_dict(), [torch.arange(4) < 2, torch.zeros(4, dtype=torch.bool)])["state"]
    run(theirs, [p, q], range(1, 2))
    assert found[0]["step"] == 1 and found[1] == {}


def test_from_adamw_in_bf16_goes_on_in_a_master():
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    theirs, mask = AdamW([q], lr=1e-4), torch.ones(4, dtype=torch.bool)
    q.grad = torch.ones_like(q)
    theirs.step()
    optimizer = MaskedAdam([p], lr=1e-4, weight_decay=0.0, masks=[mask])
    optimizer.load_state_dict(from_adamw(theirs.state_dict(), [mask]))
    for _ in range(60):  # each too small for bf16
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p < 1).all() and optimizer.state[p]["master"].dtype is torch.float32


def test_from_adamw_refuses_masks_that_do_not_fit():
    params = parameters()
    theirs = AdamW(params)
    run(theirs, params, range(1))
    with pytest.raises(TalosError, match="2 masks for 5 parameters"):
        from_adamw(theirs.state_dict(), masks()[:2])
    with pytest.raises(TalosError, match=r"the mask of parameter 0 has shape \(7,\), the parameter \(50, 20\)"):
        from_adamw(theirs.state_dict(), [masks()[1], *masks()[1:]])
    with pytest.raises(TalosError, match="the mask of 'p0' matches no parameter"):
        from_adamw(theirs.state_dict(), {"p0": masks()[0]})


def new_masks():
    """Other entries; one mask less, one more; one that was empty, one that is."""
    torch.manual_seed(2)
    shapes = [mask.shape for mask in masks()]
    return [torch.rand(shape) < size for shape, size in zip(shapes, (0.5, 0.3, 0.9, -1.0, 1.1), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_set_masks_keeps_the_moments_of_surviving_entries(place, dtype):
    params = parameters(dtype, place)
    optimizer = MaskedAdam(params, lr=0.1, masks=masks(), amsgrad=True)
    run(optimizer, params, range(3))
    before = to_adamw(optimizer.state_dict())["state"]
    kept = copied(params)
    optimizer.set_masks(new_masks())
    after = to_adamw(optimizer.state_dict())["state"]
    for number, (old, new) in enumerate(zip(masks(), new_masks(), strict=True)):
        assert (number in after) == bool(old.any() and new.any())
        for key, value in after.get(number, {}).items():
            if key == "step":
                assert float(value) == 3.0
            else:
                assert torch.equal(on_cpu(value), torch.where(old & new, on_cpu(before[number][key]), 0))
    wide = [torch.nn.Parameter(on_cpu(p).float().clone()) for p in params]
    for p, q, new in zip(params, wide, new_masks(), strict=True):
        if "master" in optimizer.state.get(p, {}):
            master = on_cpu(optimizer.state[p]["master"])
            q.data[new] = torch.where(master != 0, master, q.data[new])  # entries that are new have none
    theirs = AdamW(wide, lr=0.1, amsgrad=True)
    theirs.load_state_dict(to_adamw(optimizer.state_dict()))
    for step in range(3, 5):
        run(optimizer, params, [step])
        for p, q in zip(params, wide, strict=True):
            q.grad = on_cpu(p.grad).float()
        theirs.step()
    assert_stepped_by(optimizer, place)
    close = CLOSE_ON[place] if dtype is torch.float32 else dict(rtol=2**-7, atol=1e-7)
    for p, q, start, new in zip(params, wide, kept, new_masks(), strict=True):
        assert torch.equal(on_cpu(p)[~new], on_cpu(start)[~new])
        torch.testing.assert_close(on_cpu(p)[new], q.detach()[new].to(dtype), **close)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_set_masks_from_dense_and_back(layout):
    """A parameter that loses its mask goes on as AdamW's: nothing was selected but what it now has moments of."""
    mask = torch.rand(4, 8, 3, 3) < 0.5
    p = torch.nn.Parameter(torch.randn(4, 8, 3, 3).to(memory_format=layout))
    optimizer = MaskedAdam([p])
    run(optimizer, [p], range(2))
    dense = optimizer.state[p]["exp_avg"].clone()
    optimizer.set_masks([mask])
    assert torch.equal(to_adamw(optimizer.state_dict())["state"][0]["exp_avg"], torch.where(mask, dense, 0))
    optimizer.set_masks({})
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.where(mask, dense, 0))
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    q = torch.nn.Parameter(p.detach().clone())
    theirs = AdamW([q])
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, [p], range(2, 4))
    run(theirs, [q], range(2, 4))
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_what_has_lost_its_mask_is_kept_as_adamw_keeps_it(dtype):
    p = torch.nn.Parameter(drawn(4, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    optimizer = MaskedAdam([p], masks=[drawn(4, 4, 3, 3, seed=1) > 0])
    run(optimizer, [p], range(1))
    optimizer.set_masks({})
    q = torch.nn.Parameter(p.detach().clone())
    run(oracle := AdamW([q]), [q], range(1))
    found, expected = (
        {key: (value.dtype, value.stride()) for key, value in state.items()}
        for state in (optimizer.state[p], oracle.state[q])
    )
    assert found == expected


def test_set_masks_wakes_what_had_no_entry(place):
    p, q = (torch.nn.Parameter(torch.ones(4, device=device_of(place))) for _ in range(2))
    optimizer = MaskedAdam([p, q], masks={p: torch.zeros(4, dtype=torch.bool)})
    run(optimizer, [p, q], range(1))
    optimizer.set_masks({p: torch.arange(4) < 2})
    run(optimizer, [p, q], range(1, 2))
    assert (p != 1).tolist() == [True, True, False, False]


def test_set_masks_that_do_not_fit_change_nothing():
    params = parameters()
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    before = optimizer.state_dict()["state"]
    with pytest.raises(TalosError, match="2 masks for 5 parameters"):
        optimizer.set_masks(masks()[:2])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[n][key]) for n, state in before.items() for key, value in state.items())


class Net(torch.nn.Module):
    """One parameter of each kind of mask."""

    def __init__(self) -> None:
        super().__init__()
        for n, p in enumerate(parameters()):
            self.register_parameter(f"p{n}", p)


def masked(net, dtype=torch.float32):
    net.to(dtype)
    return MaskedAdam(net.named_parameters(), masks={f"p{n}": mask for n, mask in enumerate(masks())}, amsgrad=True)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoints_calling_conventions(dtype, full):
    """torch.distributed.checkpoint in one process: it steps with zero gradients, and loads by keyword."""
    net = Net()
    optimizer = masked(net, dtype)
    params = list(net.parameters())
    run(optimizer, params, range(3))
    options = StateDictOptions(full_state_dict=full)
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
    other = copy.deepcopy(net)
    fresh = masked(other, dtype)
    before = copied(other.parameters())
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert equal(other.parameters(), before)
    for p, q in zip(params, other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key]) and value.dtype == fresh.state[q][key].dtype
    run(optimizer, params, range(3, 5))
    run(fresh, list(other.parameters()), range(3, 5))
    assert equal(params, other.parameters())
    fresh.load_state_dict(state_dict=optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flattened_distributed_checkpoints_go_through_adamws_format(dtype):
    """They load no key that the live state has not, so the masks are lost; as AdamW's they come through."""
    net, options = Net(), StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer = masked(net, dtype)
    other = Net().to(dtype)
    fresh = masked(other, dtype)
    run(optimizer, list(net.parameters()), range(3))
    with pytest.raises(TalosError, match="a flattened distributed checkpoint loses masks"):
        set_optimizer_state_dict(
            other, fresh, get_optimizer_state_dict(net, optimizer, options=options), options=options
        )
    wanted = {f"p{n}": mask for n, mask in enumerate(masks())}
    optimizer.register_state_dict_post_hook(lambda _, content: to_adamw(content))
    fresh.register_load_state_dict_pre_hook(lambda _, content: from_adamw(content, wanted))
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(net, optimizer, options=options), options=options)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert key == "master" or torch.equal(value, fresh.state[q][key])


def test_a_masks_state_may_be_loaded_through_a_users_hook():
    """A pre-hook that converts: AdamW's checkpoint straight into a masked optimizer."""
    dense = parameters()
    theirs = AdamW(dense)
    run(theirs, dense, range(2))
    params = copied(dense)
    optimizer = MaskedAdam(params, masks=masks())
    optimizer.register_load_state_dict_pre_hook(lambda _, content: from_adamw(content, masks()))
    optimizer.load_state_dict(theirs.state_dict())
    run(theirs, dense, range(2, 4))
    run(optimizer, params, range(2, 4))
    for p, q, mask in zip(params, dense, masks(), strict=True):
        torch.testing.assert_close(p[mask], q[mask], **CLOSE)
