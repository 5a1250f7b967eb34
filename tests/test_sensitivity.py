"""Per-sample squared gradients: small networks against torch.func in float64, estimators, and refusals."""

import logging
import weakref

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import TOLERANCE, assert_equal, by_vmap, logit, randomized, uncovered
from torch import nn

from talos_fast import TalosError
from talos_fast.ranks import Ranks
from talos_fast.sensitivity import maskable_parameters, sensitivities
from talos_fast.sensitivity.estimators import Draws, probe
from talos_fast.sensitivity.per_sample import gradients_one_by_one


def open_clip_tower(width: int = 48) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(32, 8, width, 2, 3, 4.0, output_dim=24)
    return randomized(nn.Sequential(tower, nn.Linear(24, 5)))


def images(samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, 3, 32, 32).double(), torch.randint(0, 5, (samples,))


class Net(nn.Module):
    """Shared weights, a raw scale, a raw shift, a matmul, a grouped convolution and time-first activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.shared = nn.Linear(6, 6)
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.right = nn.Parameter(torch.randn(6, 8))
        self.norm = nn.RMSNorm(8)
        self.time_first = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        h = self.grouped(torch.tanh(self.conv(x))).flatten(2).transpose(1, 2)
        h = self.shared(torch.tanh(self.shared(h))) * self.scale + self.shift
        h = self.norm(h @ self.right)
        return self.out(torch.tanh(self.time_first(h.transpose(0, 1))).sum(0))


def layer_and_batch(classes: int = 3) -> tuple[nn.Linear, tuple[torch.Tensor, torch.Tensor]]:
    return nn.Linear(4, classes), (torch.randn(5, 4), torch.randint(0, classes, (5,)))


@pytest.mark.parametrize("samples", [1, 2, 3, 9])
def test_every_kind_of_use_and_the_fallback(samples, caplog):
    """Nine samples of nine tokens: an axis that is taken for the batch by its size would be wrong here."""
    model = randomized(Net())
    batch = (torch.randn(samples, 3, 6, 6).double(), torch.randint(0, 4, (samples,)))
    with caplog.at_level(logging.WARNING, "talos_fast"):
        found = sensitivities(model, [batch], estimator="sampled-logit", labels=[batch[1]])
    assert_equal(found, by_vmap(model, logit, batch))
    assert uncovered(caplog) == ["grouped.weight", "grouped.bias"] and len(caplog.records) == 1


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 5), tokens=st.integers(0, 5), width=st.integers(1, 6), classes=st.integers(2, 4))
def test_shapes(samples, tokens, width, classes):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.out = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, classes)

        def forward(self, x):
            return self.out(torch.sin(self.norm(x + torch.sin(self.first(x)))).sum(1))

    torch.manual_seed(samples * 1000 + tokens * 100 + width * 10 + classes)
    model = Tokens().double()
    for p in model.parameters():
        nn.init.normal_(p)
    batch = (torch.randn(samples, tokens, width).double(), torch.randint(0, classes, (samples,)))
    found = sensitivities(model, [batch], estimator="sampled-logit", labels=[batch[1]])
    expected = by_vmap(model, logit, batch)
    for name, score in found.items():
        # What feeds a norm of one feature has no gradient: 1/√ε times rounding noise, squared, is left of it.
        assert (score - expected[name]).abs().max() <= TOLERANCE * expected[name].max() + 1e-22, name


def test_the_batch_size_does_not_change_the_result():
    model, (x, y) = open_clip_tower(), images(6)
    whole = sensitivities(model, [(x, y)], estimator="empirical")
    parts = sensitivities(model, [(x[:1], y[:1]), (x[1:6], y[1:6])], estimator="empirical")
    for name, score in whole.items():
        assert (score - parts[name]).abs().max() <= 1e-12 * score.max()


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4).double() * 2, torch.tensor([0, 1, 3])


@pytest.mark.parametrize("estimator", ["fisher", "sampled-logprob", "sampled-logit", "jacobian"])
def test_probes_are_unbiased(estimator):
    """E[a aᵀ] is what each estimator promises, over 20,000 draws."""
    logits, labels = logits_and_labels()
    many = probe(estimator, logits.repeat(20000, 1), labels.repeat(20000), None, Draws(0, range(60000)))
    draws = many.view(20000, *logits.shape)
    found = torch.einsum("rnk,rnj->nkj", draws, draws) / len(draws)
    p = logits.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = {"jacobian": torch.eye(4).double().expand(3, 4, 4), "sampled-logit": torch.diag_embed(p)}.get(
        estimator, fisher
    )
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("estimator", ["empirical", "sampled-logprob"])
def test_probing_is_differentiating_the_log_probability(estimator):
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    logits.log_softmax(-1)[range(3), labels].sum().backward()
    a = probe(estimator, logits, labels, labels, Draws(0, range(3)))
    torch.testing.assert_close(a, logits.grad)


def test_repeats_average_and_seeds_repeat():
    model, batch = open_clip_tower(), images()
    once = sensitivities(model, [batch], estimator="empirical")
    often = sensitivities(model, [batch], estimator="empirical", samples_per_input=3)
    again, other = (sensitivities(model, [batch], seed=seed) for seed in (0, 1))
    for name, score in sensitivities(model, [batch], seed=0).items():
        assert torch.equal(score, again[name])
        torch.testing.assert_close(once[name], often[name])
    assert any(not torch.equal(again[name], other[name]) for name in again)


def test_the_probes_of_an_input_are_different_ones():
    net, batch = layer_and_batch()
    one, two = (sensitivities(net, [batch], samples_per_input=repeats)["weight"] for repeats in (1, 2))
    assert not torch.allclose(one, two)


@pytest.mark.parametrize("estimator", ["jacobian", "sampled-logit"])
def test_a_single_logit_is_scored_where_its_probability_is_not_asked_for(estimator):
    net, batch = layer_and_batch(classes=1)
    found = sensitivities(net, [batch], estimator=estimator)
    torch.testing.assert_close(found["weight"][0], batch[0].square().sum(0))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_scores_have_the_dtype_that_is_asked_for(dtype):
    net, batch = layer_and_batch()
    found = sensitivities(net, [batch], dtype=dtype)
    assert {score.dtype for score in found.values()} == {dtype or torch.float32}


def test_all_ranks_get_the_sum(monkeypatch):
    net, batch = layer_and_batch()
    alone = sensitivities(net, [batch])
    monkeypatch.setattr(Ranks, "sum", lambda self, tensors: [tensor.mul_(2) for tensor in tensors])  # a twin's
    assert all(torch.equal(score, 2 * alone[name]) for name, score in sensitivities(net, [batch]).items())


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[2].bias.requires_grad_(False)
    found = sensitivities(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))])
    assert set(found) == {"0.weight", "0.bias", "2.weight"}
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert model.training and model[1].training and all(p.grad is None for p in model.parameters())


def test_samples_that_interact_are_refused():
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(TalosError, match="batch 0: logits change with the other samples"):
        sensitivities(Mixing(3, 2), [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))])


@pytest.mark.parametrize("batches, message", [
    ([], "there is no batch"),
    ([(torch.randn(0, 3), torch.zeros(0, dtype=torch.long))], "batch 0: the batch is empty"),
    ([(torch.randn(2, 3), torch.tensor([0, 2]))], r"batch 0: labels 0 … 2, but the model has 2 classes"),
    ([(torch.full((2, 3), float("nan")), torch.tensor([0, 1]))], "batch 0: the logits hold NaN"),
    ([torch.randn(2, 3)], r"batch 0: no labels of shape \(N,\), found a Tensor"),
    ([(torch.randn(2, 3), torch.tensor([0, 1]), None)], r"batch 0: no labels of shape \(N,\), found a tuple"),
    ([(torch.randn(2, 3), torch.tensor([True, False]))], "batch 0: labels of torch.bool; give class indices"),
    ([(torch.randn(2, 3), torch.zeros(2, 1))], r"batch 0: no labels of shape \(N,\), found labels of shape \(2, 1\)"),
    ([(torch.randn(2, 3), torch.tensor([0.0, float("nan")]))], "batch 0: labels of torch.float32; give class indices"),
])  # fmt: skip
def test_bad_batches_are_named(batches, message):
    with pytest.raises(TalosError, match=message):
        sensitivities(nn.Linear(3, 2), batches)


def test_maskable_parameters_and_their_refusals():
    model = open_clip_tower()
    names = set(maskable_parameters(model))
    assert "0.transformer.resblocks.0.attn.in_proj_weight" in names
    assert "0.conv1.weight" in names and "0.class_embedding" not in names and "0.positional_embedding" not in names
    assert list(maskable_parameters(model, include="*class_embedding")) == ["0.class_embedding"]
    assert not [n for n in maskable_parameters(model, exclude=["*ln_*"]) if "ln_" in n]
    with pytest.raises(TalosError, match="'nothing' matches no parameter"):
        maskable_parameters(model, include=["nothing"])
    with pytest.raises(TalosError, match="no maskable parameter"):
        maskable_parameters(nn.Embedding(3, 3))
    with pytest.raises(TalosError, match="estimator='x': choose one of fisher"):
        sensitivities(model, [images()], estimator="x")


def test_what_is_frozen_or_excluded_is_not_maskable():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].bias.requires_grad_(False)
    assert list(maskable_parameters(net)) == ["0.weight", "1.weight", "1.bias"]
    assert list(maskable_parameters(net, include="*", exclude="1.*")) == ["0.weight"]


@pytest.mark.parametrize("name, frozen", [
    ("resnet10t", {"fc.weight", "fc.bias"}),
    ("beit_base_patch16_224", {"cls_token", "blocks.0.attn.relative_position_bias_table", "head.weight"}),
    ("deit_tiny_distilled_patch16_224", {"dist_token", "head_dist.weight", "pos_embed"}),
    ("coat_tiny", {"cls_token1", "head.weight"}),
])  # fmt: skip
def test_heads_and_positions_of_timm_stay_frozen(name, frozen):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {name for name, _ in model.named_parameters()}
    assert frozen <= names and not frozen & maskable_parameters(model).keys()


def test_a_body_that_is_called_fc_is_maskable():
    model = nn.Module()
    model.fc, model.out = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2)
    assert "fc.0.weight" in maskable_parameters(model)
    model.fc = nn.Linear(3, 4)
    assert list(maskable_parameters(model)) == ["out.weight", "out.bias"]


class Nested(torch.autograd.Function):
    """A checkpoint of the model's own, as some libraries have: recomputes inside the backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x).detach()

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(gradient)
        return x.grad, None


def test_a_gradient_that_comes_in_parts_is_refused():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    loop = gradients_one_by_one(
        layer, dict(layer.named_parameters()), lambda m, x: Nested.apply(Nested.apply(m(x), m), m), x, x, print
    )
    with pytest.raises(TalosError, match="'weight' gets its gradient in parts|'bias' gets its gradient in parts"):
        list(loop)
    assert layer.weight.grad is None


def test_no_two_gradients_are_held_at_once():
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(5)])
    model[2].weight.grad = mine = torch.ones(3, 3)
    alive, most = [], []

    def receive(name, gradient):
        alive.append(weakref.ref(gradient))
        most.append(sum(ref() is not None for ref in alive))

    x = torch.randn(2, 3)
    logits = list(gradients_one_by_one(model, dict(model.named_parameters()), lambda m, x: m(x), x, x, receive))
    assert torch.equal(torch.stack(logits), model(x))
    assert most == [1] * 10
    assert model[2].weight.grad is mine
