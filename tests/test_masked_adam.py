"""MaskedAdam against torch.optim.AdamW: the same steps on the selected entries, the others untouched, the contract.

Plain torch (``fused=False``) agrees bit for bit. The C++ operator rounds as torch's for-loop does but for one thing:
its square root is IEEE's, while torch's comes from MKL and is off by one ulp in 0.5 % of all cases.
"""

import copy
import io
import pickle
import re

import pytest
import torch
from torch.optim import AdamW
from torch.testing._internal.common_optimizers import optim_error_inputs_func_adamw, optim_inputs_func_adamw

from talos_fast import MaskedAdam, TalosError

CONFIGS = [case.kwargs for case in optim_inputs_func_adamw("cpu") if not case.kwargs.get("differentiable")]
CONFIGS += [{"fused": True, "weight_decay": 0.1}, {"foreach": True, "amsgrad": True}, {"lr": torch.tensor(1e-2)}]
CLOSE = dict(rtol=1e-6, atol=1e-7)
SHAPES = [(50, 20), (7,), (5,), (), (2, 3, 4)]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def masks() -> list[torch.Tensor]:
    """A tenth, all, nothing, a scalar, a half."""
    torch.manual_seed(1)
    sizes = [0.1, 1.1, -1.0, 1.1, 0.5]
    return [torch.rand(shape) < size for shape, size in zip(SHAPES, sizes, strict=True)]


def run(optimizer, params, steps=range(10)) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_selected_entries_move_as_under_adamw_and_the_others_never(config):
    masked, dense = parameters(), parameters()
    ours = MaskedAdam(masked, masks=masks(), **copy.deepcopy(config))
    theirs = AdamW(dense, **copy.deepcopy(config))
    for step in range(20):
        run(ours, masked, [step])
        run(theirs, dense, [step])
        for p, reference, start, mask in zip(masked, dense, parameters(), masks(), strict=True):
            assert torch.equal(p[~mask], start[~mask])
            torch.testing.assert_close(p[mask], reference[mask], **CLOSE)
            for key, value in ours.state[p].items():
                want = theirs.state[reference][key]
                torch.testing.assert_close(value, want if key == "step" else want[mask], **CLOSE)


@pytest.mark.parametrize("flags", [{"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.get("fused")], ids=str)
def test_in_plain_torch_they_agree_bit_for_bit(config, flags):
    if flags.get("foreach") and isinstance(config.get("lr"), torch.Tensor):
        pytest.skip("torch refuses a tensor lr with foreach")
    masked, dense = parameters(), parameters()
    run(MaskedAdam(masked, masks=masks(), **{**copy.deepcopy(config), **flags}), masked)
    run(AdamW(dense, **{**copy.deepcopy(config), **flags}), dense)
    for p, reference, start, mask in zip(masked, dense, parameters(), masks(), strict=True):
        assert torch.equal(p[~mask], start[~mask])
        assert torch.equal(p[mask], reference[mask])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_without_masks_it_is_adamw(config):
    ours, theirs = parameters(), parameters()
    optimizers = MaskedAdam(ours, **copy.deepcopy(config)), AdamW(theirs, **copy.deepcopy(config))
    run(optimizers[0], ours)
    run(optimizers[1], theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(optimizers[0].state[a][key], value) for key, value in optimizers[1].state[b].items())


@pytest.mark.parametrize("case", optim_error_inputs_func_adamw("cpu", torch.float32), ids=lambda case: case.error_regex)
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


def test_state_is_compact_and_absent_for_empty_masks():
    params = parameters()
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    for p, mask in zip(params, masks(), strict=True):
        count = int(mask.sum())
        assert (p in optimizer.state) == (count > 0)
        if count:
            assert optimizer.state[p]["exp_avg"].shape == (count,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_in_fp32(dtype):
    params, wide = parameters(dtype), [p.detach().float().requires_grad_() for p in parameters(dtype)]
    ours, theirs = MaskedAdam(params, lr=1e-4, masks=masks()), AdamW(wide, lr=1e-4)
    for step in range(20):
        torch.manual_seed(step)
        for p, q in zip(params, wide, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, q, mask in zip(params, wide, masks(), strict=True):
        rtol = torch.finfo(dtype).eps  # an ulp, where the wide values straddle a rounding boundary
        torch.testing.assert_close(p[mask], q[mask].to(dtype), rtol=rtol, atol=1e-7)
        if mask.any():
            torch.testing.assert_close(ours.state[p]["master"], q.detach()[mask], **CLOSE)


def test_loaded_weights_win_over_the_master_copy():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MaskedAdam([p], lr=0.0, masks=[torch.ones(4, dtype=torch.bool)])
    run(optimizer, [p], range(1))
    with torch.no_grad():
        p[:2] = 3.0
    run(optimizer, [p], range(1))
    assert p.tolist() == [3.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_bit_identical(dtype):
    whole = parameters(dtype)
    optimizer = MaskedAdam(whole, masks=masks(), amsgrad=True)
    run(optimizer, whole, range(5))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    part = [p.detach().clone().requires_grad_() for p in whole]
    resumed = MaskedAdam(part, masks=masks(), amsgrad=True)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(optimizer, whole, range(5, 10))
    run(resumed, part, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    assert resumed.state[part[0]]["exp_avg"].dtype is torch.float32


def test_state_of_another_mask_is_refused():
    params = parameters()
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    other = masks()
    other[0] = ~other[0]
    with pytest.raises(TalosError, match="parameter 0: the state belongs to another mask"):
        MaskedAdam(params, masks=other).load_state_dict(optimizer.state_dict())
    with pytest.raises(TalosError, match="parameter 0: saved with a mask"):
        MaskedAdam(params).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_and_pickles(clone):
    params = parameters()
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(3))
    twin, twins = clone((optimizer, params))
    run(optimizer, params, range(3, 5))
    run(twin, twins, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_groups_closures_and_missing_gradients():
    params = parameters()
    optimizer = MaskedAdam([{"params": params[:1], "masks": masks()[:1], "lr": 0.5}, {"params": params[1:2]}])
    optimizer.add_param_group({"params": params[4:], "masks": [masks()[4]]})
    assert "masks" not in optimizer.state_dict()["param_groups"][0]
    start = parameters()

    def closure():
        params[0].grad = torch.ones_like(params[0])
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert torch.equal(params[0] != start[0], masks()[0])
    assert torch.equal(params[1], start[1])
    assert list(optimizer.state) == params[:1]


def test_named_masks():
    named = [(f"p{n}", p) for n, p in enumerate(parameters())]
    optimizer = MaskedAdam(named, masks={"p0": masks()[0], "elsewhere": torch.zeros(3, dtype=torch.bool)})
    run(optimizer, [p for _, p in named], range(1))
    assert optimizer.state[named[0][1]]["exp_avg"].numel() == int(masks()[0].sum())
    assert optimizer.state[named[4][1]]["exp_avg"].shape == (2, 3, 4)


@pytest.mark.parametrize("given, message", [
    ({"typo": torch.ones(50, 20, dtype=torch.bool)}, "'typo' matches no parameter"),
    ({"p0": torch.ones(20, 50, dtype=torch.bool)}, r"'p0' has shape \(20, 50\), the parameter \(50, 20\)"),
    ({"p0": torch.ones(50, 20)}, "'p0' is torch.float32, not torch.bool"),
    ([torch.ones(50, 20, dtype=torch.bool)], "1 masks for 5 parameters"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(given, message):
    with pytest.raises(TalosError, match=message):
        MaskedAdam([(f"p{n}", p) for n, p in enumerate(parameters())], masks=given)


def test_what_is_not_supported_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TalosError, match="differentiable"):
        MaskedAdam([p], differentiable=True)
    optimizer = MaskedAdam([p], masks=[torch.ones(3, dtype=torch.bool)])
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,))
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    with pytest.raises(TalosError, match="only floating-point"):
        MaskedAdam([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))], masks=[torch.ones(3, dtype=torch.bool)])


@pytest.mark.parametrize("scheduler", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
])  # fmt: skip
def test_schedulers(scheduler):
    masked, dense = parameters(), parameters()
    for optimizer, params in ((MaskedAdam(masked, masks=masks()), masked), (AdamW(dense), dense)):
        schedule = scheduler(optimizer)
        for step in range(6):
            run(optimizer, params, [step])
            schedule.step()
    for p, q, mask in zip(masked, dense, masks(), strict=True):
        torch.testing.assert_close(p[mask], q[mask], **CLOSE)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_overflows(fused):
    p = torch.nn.Parameter(torch.ones(6))
    mask = torch.tensor([True, False] * 3)
    optimizer = MaskedAdam([p], lr=0.1, masks=[mask], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        before = p.detach().clone()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(p[~mask], torch.ones(3))
        assert torch.equal(p, before) == (factor != 1.0)
