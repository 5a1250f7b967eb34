"""Saving and loading MaskedAdam: bit-identical runs, dtypes, hooks, other masks, torch's own formats."""

import copy
import pickle

import pytest
import torch
from adam_cases import (
    CLOSE_ON,
    assert_stepped_by,
    copied,
    device_of,
    equal,
    launches,
    masks,
    on_cpu,
    parameters,
    run,
    through_a_file,
)
from torch.optim import AdamW

from talos_fast import MaskedAdam, TalosError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    "options", [{}, {"fused": True, "amsgrad": True}, {"fused": False}, {"foreach": True}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_is_bit_identical(place, dtype, options):
    whole = parameters(dtype, place)
    optimizer = MaskedAdam(whole, masks=masks(), **options)
    run(optimizer, whole, range(3))
    part = copied(whole)
    resumed = MaskedAdam(part, masks=masks(), **options)
    run(resumed, part, range(1))  # it has a state, and launches, to be replaced
    for p, q in zip(part, whole, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert not launches(resumed)
    run(optimizer, whole, range(3, 5))
    run(resumed, part, range(3, 5))
    assert equal(whole, part)
    for p, q in zip(whole, part, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]) and value.dtype is torch.float32
            assert value.device == resumed.state[q][key].device


def test_what_is_loaded_is_not_shared():
    params = parameters()
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    twins = copied(params)
    twin = MaskedAdam(twins, masks=masks())
    twin.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    run(twin, twins, range(1, 3))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][key]) for key, value in state.items())


def test_checkpoints_do_not_depend_on_the_memory_format(place):
    """Saved from channels_last weights, loaded into contiguous ones, and back."""
    start, mask = torch.randn(8, 16, 3, 3), torch.rand(8, 16, 3, 3) < 0.5
    formats = [torch.channels_last, torch.contiguous_format, torch.channels_last]
    p = torch.nn.Parameter(start.to(device_of(place), memory_format=formats[0]))
    optimizer = MaskedAdam([p], masks=[mask])
    straight = torch.nn.Parameter(start.to(device_of(place), copy=True))
    reference = MaskedAdam([straight], masks=[mask])
    run(reference, [straight], range(6))
    for turn, layout in enumerate(formats):
        p = torch.nn.Parameter(p.detach().clone(memory_format=layout))
        state = optimizer.state_dict()
        optimizer = MaskedAdam([p], masks=[mask])
        optimizer.load_state_dict(through_a_file(state))
        run(optimizer, [p], range(2 * turn, 2 * turn + 2))
        assert_stepped_by(optimizer, place)
    assert torch.equal(p, straight)


def test_hooks_of_users_see_plain_tensors():
    params = parameters(torch.bfloat16)
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    seen = []

    def look(states):
        tensors = [value for state in states for value in state.values()]
        assert all(type(value) is torch.Tensor for value in tensors)
        seen.append({value.dtype for state in states for key, value in state.items() if key.startswith("exp")})

    optimizer.register_state_dict_post_hook(lambda _, content: look(content["state"].values()))
    optimizer.register_load_state_dict_pre_hook(lambda _, content: look(content["state"].values()))
    optimizer.register_load_state_dict_post_hook(lambda me: look(me.state.values()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [{torch.float32}] * 3
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


def test_state_of_another_mask_is_refused():
    named = [(f"p{n}", p) for n, p in enumerate(parameters())]
    params = [p for _, p in named]
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    other = masks()
    other[0][0, :3] = ~other[0][0, :3]
    refusing = MaskedAdam(named, masks=dict(zip((name for name, _ in named), other, strict=True)))
    with pytest.raises(TalosError, match="parameter p0: the state belongs to another mask \\(3 of 1000 entries"):
        refusing.load_state_dict(optimizer.state_dict())
    assert not refusing.state and not refusing._optimizer_load_state_dict_pre_hooks
    with pytest.raises(TalosError, match="parameter 0: saved with a mask, unlike this one; pass masks="):
        MaskedAdam(params).load_state_dict(optimizer.state_dict())
    dense = AdamW(params)
    run(dense, params, range(1))
    with pytest.raises(TalosError, match="parameter 0: saved without a mask, unlike this one; use from_adamw"):
        optimizer.load_state_dict(dense.state_dict())
    turned = torch.nn.Parameter(torch.zeros(20, 50))
    with pytest.raises(TalosError, match=r"parameter 0: saved with shape \(50, 20\), this is \(20, 50\)"):
        short = {
            **optimizer.state_dict(),
            "param_groups": [{**optimizer.state_dict()["param_groups"][0], "params": [0]}],
        }
        MaskedAdam([turned], masks=[masks()[0].T]).load_state_dict(short)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        MaskedAdam(params[:2], masks=masks()[:2]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_pickles(place, clone, dtype):
    params = parameters(dtype, place)
    params[4].data = params[4].data.permute(2, 0, 1).clone().permute(1, 2, 0)  # a memory order of its own
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(2))
    twin, twins = clone((optimizer, params))
    assert not launches(twin)
    run(optimizer, params, range(2, 4))
    run(twin, twins, range(2, 4))
    assert equal(params, twins)
    assert_stepped_by(twin, place)
    assert repr(twin) == repr(optimizer)


def test_a_pickle_carries_the_masks_as_bits():
    size = 2**18
    optimizer = MaskedAdam([torch.nn.Parameter(torch.zeros(size))], masks=[torch.rand(size) < 0.5])
    assert len(pickle.dumps(optimizer)) < size * 4 + size / 8 + 4096


@pytest.mark.gpu
def test_state_moves_between_devices():
    """Saved from a GPU, where the count of steps lies on the device, loaded on the CPU, and back."""
    params = parameters(place="cuda")
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(2))
    assert optimizer.state[params[0]]["step"].is_cuda
    on_host = [torch.nn.Parameter(on_cpu(p)) for p in params]
    host = MaskedAdam(on_host, masks=masks())
    host.load_state_dict(optimizer.state_dict())
    back = [torch.nn.Parameter(p.detach().cuda()) for p in on_host]
    device = MaskedAdam(back, masks=masks())
    device.load_state_dict(host.state_dict())
    for stepped, given in ((optimizer, params), (host, on_host), (device, back)):
        run(stepped, given, range(2, 4))
    for p, q, r in zip(params, on_host, back, strict=True):
        torch.testing.assert_close(on_cpu(p), on_cpu(q), **CLOSE_ON["cuda"])
        assert torch.equal(p, r)
