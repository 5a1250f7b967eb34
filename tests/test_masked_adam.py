"""MaskedAdam against torch.optim.AdamW: the same steps on the selected entries, the others untouched.

Plain torch (``fused=False``) agrees bit for bit. The C++ operator rounds as torch's for-loop does but for one thing:
its square root is IEEE's, while torch's comes from MKL and is off by one ulp in 0.5 % of all cases. The Triton kernels
divide once less. On a GPU both sides also contract multiplications and additions as they please.
"""

import copy
import math
import re

import pytest
import torch
from adam_cases import (
    CLOSE_ON,
    assert_stepped_by,
    assert_unselected_equal,
    device_of,
    give_gradients,
    launches,
    masks,
    on_cpu,
    parameters,
    run,
)
from torch.optim import AdamW

from talos_fast import MaskedAdam, TalosError

try:
    from torch.testing._internal import common_optimizers as suite
except ModuleNotFoundError:  # it needs expecttest, which a machine with a GPU and no network may lack
    suite = None

pytestmark = pytest.mark.usefixtures("two_threads")


def configs(device: str) -> list[dict]:
    cases = suite.optim_inputs_func_adamw(device) if suite else []
    return [case.kwargs for case in cases if not case.kwargs.get("differentiable")]


ERRORS = suite.optim_error_inputs_func_adamw("cpu", torch.float32) if suite else []


CPU = [
    *configs("cpu"),
    {"fused": True, "weight_decay": 0.1},
    {"foreach": True, "amsgrad": True},
    {"lr": torch.tensor(1e-2)},
]
KERNEL = [*configs("cuda"), {"fused": True, "weight_decay": 0.1}, {"lr": torch.tensor(1e-2)}, {"betas": (0.3, 0.5)}]
KERNEL += [{"betas": (0.0, 0.999), "weight_decay": 0.0}]
CASES = [("cpu", config) for config in CPU]
CASES += [] if torch.cuda.is_available() else [("interpreter", config) for config in KERNEL]
CASES += [pytest.param("cuda", config, marks=pytest.mark.gpu) for config in KERNEL]


@pytest.mark.parametrize("place, config", CASES, indirect=["place"], ids=str)
def test_selected_entries_move_as_under_adamw_and_the_others_never(place, config):
    masked, dense = parameters(place=place), parameters(place=place)
    ours = MaskedAdam(masked, masks=masks(), **copy.deepcopy(config))
    theirs = AdamW(dense, **{**copy.deepcopy(config), **({} if place == "cuda" else {"capturable": False})})
    for step in range(8 if place == "interpreter" else 20):
        run(ours, masked, [step])
        run(theirs, dense, [step])
        assert_unselected_equal(masked, parameters(), masks())
        for p, reference, mask in zip(masked, dense, masks(), strict=True):
            torch.testing.assert_close(on_cpu(p)[mask], on_cpu(reference)[mask], **CLOSE_ON[place])
            for key, value in ours.state[p].items():
                want = on_cpu(theirs.state[reference][key])
                torch.testing.assert_close(on_cpu(value), want if key == "step" else want[mask], **CLOSE_ON[place])
    if not config.get("foreach"):
        assert_stepped_by(ours, place)


PLAIN = [(config, {"fused": False}) for config in CPU if not config.get("fused")]
PLAIN += [(config, {"foreach": True}) for config, _ in PLAIN if not isinstance(config.get("lr"), torch.Tensor)]


@pytest.mark.parametrize("config, flags", PLAIN, ids=str)
def test_in_plain_torch_they_agree_bit_for_bit(config, flags):
    masked, dense = parameters(), parameters()
    run(MaskedAdam(masked, masks=masks(), **{**copy.deepcopy(config), **flags}), masked)
    run(AdamW(dense, **{**copy.deepcopy(config), **flags}), dense)
    assert_unselected_equal(masked, parameters(), masks())
    for p, reference, mask in zip(masked, dense, masks(), strict=True):
        assert torch.equal(p[mask], reference[mask])


@pytest.mark.parametrize("config", CPU, ids=str)
def test_without_masks_it_is_adamw(config):
    ours, theirs = parameters(), parameters()
    optimizers = MaskedAdam(ours, **copy.deepcopy(config)), AdamW(theirs, **copy.deepcopy(config))
    run(optimizers[0], ours)
    run(optimizers[1], theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(optimizers[0].state[a][key], value) for key, value in optimizers[1].state[b].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_parameters_step_as_under_fused_adamw(place, dtype):
    """With bf16 moments and all. One step at a time from the same state: to an ulp, for the interpreter truncates."""
    ours, theirs = parameters(dtype, place), parameters(dtype, place)
    optimizers = MaskedAdam(ours, lr=1e-2, fused=True), AdamW(theirs, lr=1e-2, fused=True)
    close = CLOSE_ON[place] if dtype is torch.float32 else dict(rtol=torch.finfo(dtype).eps, atol=1e-7)
    for step in range(4):
        run(optimizers[0], ours, [step])
        run(optimizers[1], theirs, [step])
        for a, b in zip(ours, theirs, strict=True):
            pairs = [(optimizers[0].state[a][key], value) for key, value in optimizers[1].state[b].items()]
            for got, want in [(a, b), *pairs]:
                torch.testing.assert_close(got, want, **close)
                got.data.copy_(want)
    assert_stepped_by(optimizers[0], place)


def test_a_large_weight_without_a_mask_steps_as_it_lies(place):
    """In channels_last, and of more elements than 16 bits count."""
    value = torch.randn(8, 16, 24, 24).to(device_of(place), memory_format=torch.channels_last)
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in (value, value[0, 0])] for _ in range(2))
    optimizers = MaskedAdam(ours), AdamW(theirs)
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        run(optimizer, params, range(2))
    assert_stepped_by(optimizers[0], place)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **CLOSE_ON[place])


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.error_regex)
def test_errors_are_those_of_adamw(case):
    def outcome(optimizer):
        try:
            optimizer(case.optimizer_error_input.params, **case.optimizer_error_input.kwargs)
        except Exception as error:
            return type(error), str(error)
        return None

    theirs = outcome(AdamW)
    assert outcome(MaskedAdam) == theirs
    assert theirs is None or re.search(case.error_regex, theirs[1])


def test_state_is_compact_and_absent_for_empty_masks(place):
    params = parameters(place=place)
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    for p, mask in zip(params, masks(), strict=True):
        count = int(mask.sum())
        assert (p in optimizer.state) == (count > 0)
        if count:
            assert optimizer.state[p]["exp_avg"].shape == (count,)
    assert sum(len(one.members) for one in launches(optimizer)) == (0 if place == "cpu" else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_in_fp32(place, dtype):
    params = parameters(dtype, place)
    wide = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = MaskedAdam(params, lr=1e-4, masks=masks()), AdamW(wide, lr=1e-4)
    for step in range(6 if place == "interpreter" else 20):
        give_gradients(params, step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert_stepped_by(ours, place)
    assert_unselected_equal(params, parameters(dtype), masks())
    for p, q, mask in zip(params, wide, masks(), strict=True):
        rtol = torch.finfo(dtype).eps  # an ulp, where the wide values straddle a rounding boundary
        torch.testing.assert_close(on_cpu(p)[mask], on_cpu(q)[mask].to(dtype), rtol=rtol, atol=1e-7)
        if mask.any():
            master = on_cpu(ours.state[p]["master"])
            torch.testing.assert_close(master, on_cpu(q)[mask], **CLOSE_ON[place])
            if place != "interpreter":  # its bf16 stores truncate
                assert torch.equal(on_cpu(p)[mask], master.to(dtype))


def test_steps_that_the_host_does_not_wait_for(place):
    """The gradients lie elsewhere at each step: their addresses travel while steps before still read theirs."""
    torch.manual_seed(2)
    ahead, waited = parameters(place=place), parameters(place=place)
    gradients = [[torch.randn(p.shape).to(p.device) for p in ahead] for _ in range(3)]
    for params, waits in ((ahead, False), (waited, True)):
        optimizer = MaskedAdam(params, masks=masks())
        for step in range(6):
            for p, gradient in zip(params, gradients[step % 3], strict=True):
                p.grad = gradient
            optimizer.step()
            if waits and place == "cuda":
                torch.cuda.synchronize()
        assert_stepped_by(optimizer, place)
    assert all(torch.equal(p, q) for p, q in zip(ahead, waited, strict=True))


def test_a_small_gradient_after_a_huge_one_is_not_lost(place):
    """As torch.lerp, the mean is counted from the nearer end: from the other, 1e10 + (1 - 1e10) is 0."""
    p, q = (torch.nn.Parameter(torch.ones(4, device=device_of(place))) for _ in range(2))
    optimizers = MaskedAdam([p], betas=(0.0, 0.999), masks=[torch.ones(4) > 0]), AdamW([q], betas=(0.0, 0.999))
    for size in (1e10, 1.0):
        p.grad, q.grad = torch.full_like(p, size), torch.full_like(q, size)
        for optimizer in optimizers:
            optimizer.step()
    first, second = (o.state[w]["exp_avg"] for o, w in zip(optimizers, (p, q), strict=True))
    assert torch.equal(first, second) and first.tolist() == [1.0] * 4


def test_nan_stays_in_the_largest_second_moment(place):
    p, q = (torch.nn.Parameter(torch.ones(3, device=device_of(place))) for _ in range(2))
    optimizers = MaskedAdam([p], amsgrad=True, masks=[torch.ones(3) > 0]), AdamW([q], amsgrad=True)
    for gradient in ([1.0, 1.0, 1.0], [1.0, math.nan, math.inf], [1.0, 1.0, 1.0]):
        p.grad, q.grad = torch.tensor(gradient, device=p.device), torch.tensor(gradient, device=p.device)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, q, equal_nan=True)
    for key, value in optimizers[1].state[q].items():
        torch.testing.assert_close(optimizers[0].state[p][key], value, equal_nan=True, check_device=False)


def test_addresses_travel_only_where_gradients_moved(place):
    params = parameters(place=place)
    optimizer = MaskedAdam(params, masks=masks())
    copies = []
    for moved in (True, True, False, True):
        if moved:
            before = [p.grad for p in params]  # held, so that the new ones lie elsewhere
            give_gradients(params, 0)
        optimizer.step()
        copies.append([one._gradients._version for one in launches(optimizer)])
    del before
    assert copies[1] == copies[2] and (place == "cpu" or copies[0] < copies[1] < copies[3])


def test_hundreds_of_tensors_step_together(place):
    """More than one program of the first kernel takes."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(1, device=device_of(place))) for _ in range(300)] for _ in range(2))
    optimizers = MaskedAdam(ours, masks=[torch.ones(1) > 0] * 300), AdamW(theirs)
    for step in range(2):
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            for n, p in enumerate(params):
                p.grad = torch.full_like(p, n + step) if (n + step) % 3 else None
            optimizer.step()
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), **CLOSE_ON[place])
    steps = [[float(state["step"]) for state in map(o.state.get, o.param_groups[0]["params"])] for o in optimizers]
    assert steps[0] == steps[1]
    assert_stepped_by(optimizers[0], place)


def test_loaded_weights_win_over_the_master_copy(place):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device="cuda" if place == "cuda" else "cpu"))
    optimizer = MaskedAdam([p], lr=0.0, masks=[torch.ones(4, dtype=torch.bool)])
    run(optimizer, [p], range(1))
    with torch.no_grad():
        p[:2] = 3.0
    run(optimizer, [p], range(1))
    assert p.tolist() == [3.0, 3.0, 1.0, 1.0]


def test_named_masks():
    named = [(f"p{n}", p) for n, p in enumerate(parameters())]
    optimizer = MaskedAdam(named, masks={"p0": masks()[0], "elsewhere": torch.zeros(3, dtype=torch.bool)})
    run(optimizer, [p for _, p in named], range(1))
    assert optimizer.state[named[0][1]]["exp_avg"].numel() == int(masks()[0].sum())
    assert optimizer.state[named[4][1]]["exp_avg"].shape == (2, 3, 4)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "in parallel"])
def test_names_with_the_prefix_of_a_wrapper(wrap):
    model = wrap(torch.nn.Linear(3, 2))
    with pytest.raises(TalosError, match="pass the parameters of the module inside"):
        MaskedAdam(model.named_parameters(), masks={"weight": torch.ones(2, 3, dtype=torch.bool)})


@pytest.mark.parametrize("given, message", [
    ({"typo": torch.ones(50, 20, dtype=torch.bool)}, "'typo' matches no parameter"),
    ({"p0": torch.ones(20, 50, dtype=torch.bool)}, r"'p0' has shape \(20, 50\), the parameter \(50, 20\)"),
    ({"p0": torch.ones(50, 20)}, "'p0' is torch.float32, not torch.bool"),
    ([torch.ones(50, 20, dtype=torch.bool)], "1 masks for 5 parameters"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(given, message):
    with pytest.raises(TalosError, match=message):
        MaskedAdam([(f"p{n}", p) for n, p in enumerate(parameters())], masks=given)


@pytest.mark.parametrize("after", [False, True], ids=["first", "after a step"])
def test_what_is_not_supported_is_refused(after, place):
    p = torch.nn.Parameter(torch.ones(3, device="cuda" if place == "cuda" else "cpu"))
    with pytest.raises(TalosError, match="differentiable"):
        MaskedAdam([p], differentiable=True)
    optimizer = MaskedAdam([p], masks=[torch.ones(3, dtype=torch.bool)])
    if after:
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), device=p.device, check_invariants=True)
    with pytest.raises(RuntimeError, match="does not support sparse gradients, please consider SparseAdam"):
        optimizer.step()
    z = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=p.device))
    with pytest.raises(TalosError, match="only floating-point"):
        MaskedAdam([z], masks=[torch.ones(3, dtype=torch.bool)])
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors of supported devices"):
        MaskedAdam([z], fused=True).step()
