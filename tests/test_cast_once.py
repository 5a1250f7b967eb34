"""Frozen weights are cast once: counted below autocast, with the bits of plain autocast, on every kind of model."""

from contextlib import nullcontext

import pytest
import torch
from methods_cases import case, setup_of
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from talos_fast.cast_once import CastOnce
from talos_fast.methods import METHODS
from talos_fast.step import Step

KINDS = ("clip", "timm", "bert", "t5")


class Casts(TorchDispatchMode):
    """Counts the casts of given tensors, and of all others."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self.storages = {t.untyped_storage()._cdata for t in tensors}
        self.frozen = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            known = args[0].untyped_storage()._cdata in self.storages
            self.frozen, self.others = self.frozen + known, self.others + (not known)
        return func(*args, **(kwargs or {}))


def frozen_of(model):
    """Without the embeddings that open_clip's code casts itself."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [t for name, t in tensors if not t.requires_grad and _is_product(name)]


def _is_product(name: str) -> bool:
    return not name.endswith("_embedding")


def run(kind, method, folder, plain: bool, steps: int = 3):
    """Some steps under bf16 autocast: the model, what trains, and the casts below it after the first step."""
    torch.manual_seed(0)
    model, batches = case(kind, folder)
    setup = setup_of(model, method)
    step = Step(setup, model, functional.cross_entropy, clip=1.0, amp="bf16")
    if plain:
        step._casts = nullcontext()
    fixed = [t for (name, _), t in zip(model.named_parameters(), setup.fixed, strict=False) if _is_product(name)]
    counts = Casts([*frozen_of(model), *fixed])
    for number in range(steps):
        with counts:
            step.backward(batches[number % len(batches)], "batch")
        step.clip("batch")
        step.update(1e-3)
        step.release()
    return model, setup.trained, counts


@pytest.mark.parametrize("method", ["talos", "linearized", "l-lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_casts_a_frozen_weight_and_no_bit_changes(kind, method, tmp_path):
    # Of a folder each: a Hugging Face model may read its weights from the file for as long as it lives.
    model, trained, ours = run(kind, method, tmp_path / "ours", plain=False)
    other, expected, theirs = run(kind, method, tmp_path / "theirs", plain=True)
    assert ours.frozen == 0 and ours.others > 0
    assert theirs.frozen >= 3 * 4  # in each of three steps, at least those of two blocks
    for name, p in trained.items():
        assert p.dtype is torch.float32 and torch.equal(p, expected[name]), name
    for name, tensor in other.state_dict().items():
        assert tensor.dtype is model.state_dict()[name].dtype and torch.equal(tensor, model.state_dict()[name]), name


def test_what_trains_is_cast_anew(tmp_path):
    model, _ = case("clip", tmp_path)
    mode = CastOnce(model, torch.bfloat16)
    assert set(mode._casts) == set(model.buffers())
    model.requires_grad_(False)
    held = sum(t.nbytes for t in CastOnce(model, torch.bfloat16)._casts.values())
    assert held == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) // 2


def test_tables_that_are_only_looked_up_are_not_copied(tmp_path):
    table, tied = nn.Embedding(9, 4), nn.Embedding(9, 4)
    head = nn.Linear(4, 9)
    head.weight = tied.weight
    model = nn.Sequential(table, tied, head).requires_grad_(False)
    assert set(CastOnce(model, torch.bfloat16)._casts) == {head.weight, head.bias}


def test_where_autocast_is_off_or_another_nothing_is_exchanged():
    layer = nn.Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.float16):
        half = layer(x)
    with CastOnce(layer, torch.bfloat16):
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype is torch.float16 and torch.equal(layer(x), half)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is (x @ layer.weight.t()).dtype is torch.bfloat16
            assert torch.equal(functional.linear(input=x, weight=layer.weight, bias=layer.bias), layer(x))
            assert functional.embedding(torch.tensor([1]), layer.weight).dtype is torch.float32


@pytest.mark.parametrize("made", [nullcontext, torch.inference_mode])
def test_buffers_that_are_written_to_are_cast_anew(made):
    """Not those made in inference mode, which nobody can write to outside of it, and which count no versions."""
    layer = nn.Module()
    with made():
        layer.register_buffer("table", torch.ones(3, 4))
    x = torch.ones(2, 4)
    with CastOnce(layer, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(x, layer.table).unique() == 4
        if not layer.table.is_inference():
            layer.table.mul_(2)
            assert functional.linear(x, layer.table).unique() == 8
            compiled = torch.compile(lambda x: functional.linear(x, layer.table), backend="eager")
            for factor in (8, 16):
                assert compiled(x).unique() == factor
                layer.table.mul_(2)


def test_checkpointing_does_not_cast_again(tmp_path):
    model, batches = case("clip", tmp_path)
    model.encoder.set_grad_checkpointing()
    setup = setup_of(model, "talos")
    step = Step(setup, model, functional.cross_entropy, clip=None, amp="bf16")
    with Casts(frozen_of(model)) as counts:
        step.backward(batches[0], "batch")
    assert counts.frozen == 0


def test_every_method_keeps_its_parameters_in_float32(tmp_path):
    for method in METHODS:
        if method != "lota":  # its first run is nonlinear, its second is talos with another mask
            _, trained, _ = run("clip", method, tmp_path / method, plain=False, steps=1)
            assert all(p.dtype is torch.float32 for p in trained.values())


def test_float64_is_not_exchanged():
    """As autocast itself leaves it."""
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64)
    with CastOnce(layer, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    torch.testing.assert_close(found, x @ layer.weight.t() + layer.bias)
