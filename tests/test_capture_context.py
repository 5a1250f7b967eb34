"""Capture inside attention modules, under autocast, checkpointing and wrappers; what it refuses, and what it frees."""

import weakref

import pytest
import torch
from oracles import TOLERANCE, assert_equal, by_loop, data, randomized, scores, uncovered
from torch import Tensor, nn
from torch.nn import functional as F

from talos_fast import TalosError
from talos_fast.sensitivity import maskable_parameters
from talos_fast.sensitivity.uses import add_squares

pytestmark = pytest.mark.usefixtures("logged")


ATTENTION = {
    "self": ({}, {"need_weights": False}),
    "weights wanted": ({}, {}),
    "batch first": ({"batch_first": True}, {"need_weights": False}),
    "padding": ({}, {"need_weights": False, "padding": True}),
    "padding, weights wanted": ({}, {"padding": True, "average_attn_weights": False}),
    "causal": ({}, {"need_weights": False, "attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True}),
    "additive mask": ({}, {"attn_mask": torch.randn(3, 3).double()}),
    "a mask a sample and head": ({}, {"need_weights": False, "per_sample": True, "padding": True}),
    "cross": ({}, {"need_weights": False, "cross": True}),
    "cross, values of their own": ({}, {"need_weights": False, "cross": True, "values": True}),
    "other widths": ({"kdim": 4, "vdim": 6}, {"need_weights": False, "cross": True, "values": True}),
    "without bias": ({"bias": False}, {"need_weights": False}),
}


class Attending(nn.Module):
    def __init__(self, options, call) -> None:
        super().__init__()
        self.attention, self.out, self.call = nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 4), dict(call)
        self.first = self.attention.batch_first

    def forward(self, x):
        call, query = dict(self.call), x[:, :3]
        hidden = x[..., 0] > 0.5 if call.pop("padding", False) else None
        hidden = None if hidden is None else hidden[:, :3].index_fill(1, torch.tensor([0]), False)
        key = value = query
        if call.pop("cross", False):
            key = value = x[:, 2:, : self.attention.kdim]
        if call.pop("per_sample", False):
            call["attn_mask"] = x[:, :3, :3].repeat_interleave(2, 0)
        if call.pop("values", False):
            value = 2 * x[:, 2:, : self.attention.vdim]
        if query is key:
            args = (query if self.first else query.transpose(0, 1),) * 3
        else:
            args = tuple(t.transpose(0, 1) for t in (query, key, value))
            args = (args[0], args[1], args[1]) if key is value else args
        mixed = self.attention(*args, key_padding_mask=hidden, **call)[0]
        return self.out(torch.tanh(mixed).sum(1 if self.first else 0))


@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention(name, caplog):
    options, call = ATTENTION[name]
    model, batch = randomized(Attending(options, call)), data(4, 6, 8)
    found = scores(model, batch)
    truth = by_loop(model, lambda m, b: m(b[0]), batch, batch[1])
    if "attention.in_proj_bias" in truth:
        # The key third has no gradient: the softmax does not see a shift.
        for part in (found, truth):
            assert part["attention.in_proj_bias"][8:16].max() < 1e-25 * max(1, part["attention.in_proj_bias"].max())
    assert_equal(found, truth)
    assert not uncovered(caplog)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, caplog):
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = checkpoint(lambda h: self.block(torch.tanh(self.first(h))), x, use_reentrant=reentrant)
            return self.out(h.sum(1))

    model, batch = randomized(Saving()), data(4, 3, 8)
    found = scores(model, batch)
    truth = by_loop(model, lambda m, b: m.out(m.block(torch.tanh(m.first(b[0]))).sum(1)), batch, batch[1])
    for name, score in found.items():
        assert (score - truth[name]).abs().max() <= TOLERANCE * truth[name].max()
    assert not uncovered(caplog)
    assert checkpoint(torch.sin, batch[0].requires_grad_(), use_reentrant=reentrant).grad_fn is not None


def test_compiled_and_wrapped_models_have_the_names_of_the_model():
    model, batch = randomized(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))), data(4, 5)
    truth = scores(model, batch)
    compiled, parallel = torch.compile(model), nn.DataParallel(model)
    for wrapped in (compiled, parallel, nn.Sequential(compiled)):
        found = scores(wrapped, batch)
        prefix = "0._orig_mod." if isinstance(wrapped, nn.Sequential) else ""
        assert list(found) == [prefix + name for name in truth]
        assert all(torch.equal(found[prefix + name], score) for name, score in truth.items())
    assert list(maskable_parameters(compiled)) == list(truth)


def test_autocast_keeps_the_scores_in_fp32():
    model = randomized(nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))).float()
    x, y = data(8, 16)
    batch = (x.float(), y)
    exact = scores(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scores(model, batch)
    for name, score in rounded.items():
        assert score.dtype is torch.float32
        assert (score - exact[name]).abs().max() < 0.1 * exact[name].max(), name
    assert not torch.equal(rounded["0.weight"], exact["0.weight"])


def test_batch_norms_that_mix_samples_are_refused_by_name():
    batch = data(4, 5)
    model = randomized(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(TalosError, match="'1' is a BatchNorm1d without running statistics"):
        scores(model, batch)
    model[1] = nn.BatchNorm1d(4).double()

    def training(model, batch):
        return F.batch_norm(model[0](batch[0]), None, None, model[1].weight, model[1].bias, training=True)

    with pytest.raises(TalosError, match="'1.weight', '1.bias'.* uses the statistics of the batch"):
        scores(model, batch, forward=training)


def test_sharded_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 5).as_subclass(type("Sharded", (Tensor,), {})))
    with pytest.raises(TalosError, match=r"'0.weight' is a Sharded, not a plain tensor"):
        maskable_parameters(model)


def test_captures_are_freed_layer_by_layer(monkeypatch):
    """When the first layer is squared, last in the backward, the inputs of the later ones are gone."""
    inputs, alive = [], []

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.out = nn.ModuleList([nn.Linear(5, 5) for _ in range(6)]), nn.Linear(5, 4)

        def forward(self, x):
            if len(x) == 4:
                inputs.clear()
            for layer in self.layers:
                inputs.append(weakref.ref(x))
                x = torch.tanh(layer(x))
            return self.out(x)

    def watched(uses, into, precision):
        alive.append(sum(ref() is not None for ref in inputs))
        add_squares(uses, into, precision)

    monkeypatch.setattr("talos_fast.sensitivity.scorer.add_squares", watched)
    model, batch = randomized(Deep()), data(4, 5)
    scores(model, batch, samples_per_input=2)
    second = alive[len(alive) // 2 :]  # the last probe frees, the ones before it must not
    assert alive[len(alive) // 2 - 1] == 6
    assert second[0] == 6 and second[-1] <= 2 and second == sorted(second, reverse=True)
