"""Edits of a model by vectors: one over another, too far, through wrappers, and of what is no plain tensor."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import talos_fast as talos
from talos_fast import TalosError, TaskVector
from talos_fast.edit import Edit
from talos_fast.modules import unwrapped


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def vector(seed: int) -> TaskVector:
    """Of ``net()``; moves about half of its weights."""
    base, tuned, generator = net(), net(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tuned.parameters():
            p += torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) < 0.5)
    return TaskVector(base, tuned)


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_the_last_that_was_applied_is_reverted_first(kind):
    """In the other order either would bring back what the other had written."""
    model, first, second = net(), vector(1), vector(2)
    target = model if kind == "module" else model.state_dict()
    first.apply_to(target, 0.3)
    second.apply_to(target, 0.3, check_base=False)
    edited = copy.deepcopy(model)
    with pytest.raises(TalosError, match="changed after it was applied; revert what was applied last first"):
        first.revert(target)
    assert same(model, edited)
    first.revert(second.revert(target))
    assert same(model, net())


def test_vectors_that_do_not_meet_are_reverted_in_any_order():
    model, half, moved = net(), vector(1), vector(2)
    weight, bias = ({name: delta for name, delta in v.deltas.items() if part in name} for v, part in
                    ((half, "weight"), (moved, "bias")))  # fmt: skip
    first, second = half.with_deltas(weight), moved.with_deltas(bias)
    second.apply_to(first.apply_to(model), check_base=False)
    second.revert(first.revert(model))
    assert same(model, net())


def test_a_model_that_trained_since_is_not_reverted():
    model, one = net(), vector(1)
    one.apply_to(model)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(TalosError, match="load the model anew if it was trained since"):
        one.revert(model)


def test_running_statistics_may_go_on_before_the_way_back():
    model, tuned = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    tuned[1].running_mean += 1
    start, one = copy.deepcopy(model.state_dict()), TaskVector(model, tuned)
    one.apply_to(model, 0.5)
    model.train()(torch.randn(8, 3))
    one.revert(model)
    untouched = ("1.running_var", "1.num_batches_tracked")
    assert all(torch.equal(start[name], t) for name, t in model.state_dict().items() if name not in untouched)


@pytest.mark.parametrize("replaced", ["cast", "assigned"])
def test_tensors_that_were_replaced_are_not_reverted(replaced):
    model, one = net(), vector(1)
    one.apply_to(model)
    if replaced == "cast":
        model.double()
    else:
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    with pytest.raises(TalosError, match="tensors of the model were replaced after"):
        one.revert(model)


@pytest.mark.parametrize("dtype, alpha", [(torch.float32, 1e40), (torch.float16, 1e6), (torch.bfloat16, -1e39)])
def test_a_coefficient_that_overflows_leaves_the_base(dtype, alpha):
    base, tuned = net().to(dtype), net(1).to(dtype)
    one = TaskVector(base, tuned)
    for edit in (lambda: talos.merge(base, [one], alpha=alpha, inplace=True), lambda: one.apply_to(base, alpha)):
        with pytest.raises(TalosError, match="NaN or infinite: coefficients .* are too large; the base is left"):
            edit()
        assert same(base, net().to(dtype))
    edit = Edit(base, one.deltas)
    edit.move(0.5)
    with pytest.raises(TalosError, match="too large"):
        edit.move(alpha)
    edit.require_in_place(base)
    assert same(base, net().to(dtype))


def test_a_model_that_is_broken_already_is_not_the_coefficient_s_fault():
    model = net()
    model[0].weight.data.fill_(torch.nan)
    with pytest.raises(TalosError, match="the model holds such entries already"):
        vector(1).apply_to(model, check_base=False)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "in parallel"])
def test_wrappers_are_looked_through(wrap):
    one = vector(1)
    merged = talos.merge(net(), [one])
    assert list(TaskVector(wrap(net()), wrap(merged))) == list(one)
    wrapped = wrap(net())
    one.apply_to(wrapped)
    assert same(wrapped, merged)
    assert same(one.revert(wrapped), net())
    one.revert(unwrapped(one.apply_to(wrapped)))  # either names the one model
    assert same(wrapped, net())
    assert same(talos.merge(wrap(net()), [one]), merged)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "in parallel"])
def test_state_dicts_of_wrappers_are_of_the_model_inside(wrap):
    one = TaskVector(wrap(net()).state_dict(), wrap(vector(1).apply_to(net())).state_dict())
    assert all(name.startswith(("module.", "_orig_mod.")) for name in one)
    for model in (net(), wrap(net())):
        assert same(one.apply_to(model, check_base=False), vector(1).apply_to(net()))


def test_a_child_by_the_name_that_compilation_gives_is_no_wrapper():
    def odd() -> nn.Module:
        model = nn.Module()
        model._orig_mod, model.extra = nn.Linear(2, 2), nn.Linear(2, 2)
        return model

    base = odd()
    tuned = copy.deepcopy(base)
    tuned.extra.weight.data += 1
    assert list(TaskVector(base, tuned)) == ["extra.weight"]


@pytest.mark.parametrize("factor", [0.5, np.float32(0.5), np.int64(2), torch.tensor(0.5)], ids=str)
def test_factors_are_numbers_of_any_kind(factor):
    one = vector(1)
    expected = (float(factor) * one).to_dense()
    for scaled in (factor * one, one * factor):
        assert all(torch.equal(value, expected[name]) for name, value in scaled.to_dense().items())


def test_what_is_no_factor_is_refused():
    for divisor in (0, torch.tensor(0.0), float("inf")):
        with pytest.raises(TalosError, match=f"divided by {float(divisor):g}"):
            vector(1) / divisor
    for factor in ("2", torch.ones(2), torch.tensor(1j), 1j):
        with pytest.raises(TypeError):
            vector(1) * factor
        with pytest.raises(TypeError):
            vector(1) / factor


def test_a_divisor_s_precision_is_not_the_quotient_s():
    one = TaskVector(*({"w": torch.full((1,), x, dtype=torch.float64)} for x in (0.0, 1.0)))
    assert (one / torch.tensor(3.0)).to_dense()["w"] == 1 / 3


def state(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"w": tensor}


@pytest.mark.parametrize("base, tuned, said", [
    (state(torch.tensor([1 + 1j])), state(torch.tensor([5 + 1j])), "'w' is complex, and moved"),
    (state(torch.ones(2, device="meta")), state(torch.ones(2)), "'w' is on the meta device, without numbers"),
    (*(state(torch.full((2,), x).to(torch.float8_e4m3fn)) for x in (1.0, 2.0)), "'w' is torch.float8_e4m3fn"),
])  # fmt: skip
def test_tensors_that_no_vector_can_hold(base, tuned, said):
    with pytest.raises(TalosError, match=said):
        TaskVector(base, tuned)


@pytest.mark.parametrize("frequency", [1 + 1j, complex("nan")], ids=str)
def test_complex_tensors_that_stay_are_no_concern(frequency):
    still = {"frequencies": torch.tensor([frequency])}
    assert list(TaskVector(still | state(torch.zeros(1)), still | state(torch.ones(1)))) == ["w"]


def test_complex_parameters_do_not_train():
    model = nn.Linear(3, 2)
    model.shift = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(TalosError, match="'shift' is torch.complex64; only real numbers train: freeze it"):
        talos.finetune(model, batches, method="nonlinear", steps=1, progress=False)
    model.shift.requires_grad_(False)
    assert "shift" not in talos.finetune(model, batches, method="nonlinear", steps=1, progress=False)
