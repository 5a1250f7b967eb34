"""Models in 16 bits: the same axes as in fp32, though fp16 gradients are subnormal, and nothing less is refused."""

import pytest
import torch
from oracles import by_loop, uncovered
from torch import nn

from talos_fast import TalosError
from talos_fast.forward import default_forward
from talos_fast.ranks import Ranks
from talos_fast.sensitivity import sensitivities, uses
from talos_fast.sensitivity.accumulate import accumulate_squared_per_sample_ as accumulate
from talos_fast.sensitivity.axis import HALF, SCALE, Axis, codes, consistent, row_values
from talos_fast.sensitivity.scorer import Scorer
from talos_fast.sensitivity.selection import maskable_parameters

pytestmark = pytest.mark.usefixtures("logged")
HALVES = [torch.float16, torch.bfloat16]


class Tokens(nn.Module):
    """Tokens first; the one that is read hardly attends to the others, so that their gradients are small."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.out, self.factor = nn.Linear(32, 4), 1e-3

    def forward(self, x):
        return self.factor * self.out(self.body(x.transpose(0, 1))[0])


def batch(dtype=torch.float32, samples=4):
    return torch.randn(samples, 4, 32).to(torch.float16).to(dtype), torch.arange(samples) % 4


def scored(model, examples):
    """The scores of the labels' logits, and what was found out about the model."""
    parameters = maskable_parameters(model, ["*"], None)
    scorer = Scorer(model, parameters, default_forward, "sampled-logit", 1, "full")
    ledger = scorer.ledger(None, None)
    scorer.score([examples], lambda _: ledger, 0, Ranks(), labels=[examples[1]])
    return {name: sums.values for name, sums in ledger.items()}, scorer.findings


@pytest.mark.parametrize("dtype", HALVES)
def test_the_axes_are_those_of_fp32_and_the_scores_near(dtype, caplog):
    torch.manual_seed(0)
    model = Tokens().to(dtype).eval()
    x, y = batch(dtype)
    found, findings = scored(model, (x, y))
    assert not uncovered(caplog)
    model.float()
    assert findings.axes == scored(model, (x.float(), y))[1].axes and Axis(1, True) in findings.axes.values()
    truth = by_loop(model.double(), lambda m, b: m(b[0]), (x.double(), y), y)
    for name, score in found.items():
        assert (score - truth[name]).abs().max() < 16 * torch.finfo(dtype).eps * truth[name].max(), name


def test_gradients_that_overflow_when_scaled_up(caplog):
    model, (x, y) = Tokens().half().eval(), batch(torch.float16)
    model.factor = 100.0
    found, findings = scored(model, (x, y))
    assert not uncovered(caplog) and Axis(1, True) in findings.axes.values() and findings.scale < SCALE
    assert all(score.isfinite().all() for score in found.values())


class Beside(nn.Module):
    """Tokens first in fp32, beside one layer in fp16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.out, self.low = nn.Linear(32, 32), nn.Linear(32, 4), nn.Linear(32, 4).half()
        self.factor = factor

    def forward(self, x):
        hidden = torch.tanh(self.body(x.transpose(0, 1))).mean(0)
        return self.factor * self.out(hidden) + self.low(x[:, 0].half()).float()


@pytest.mark.parametrize("factor", [1.0, 1e-9])
def test_gradients_in_fp32_are_not_judged_by_the_limits_of_fp16(factor, caplog):
    """A floor for fp16 would let any axis pass where they are small."""
    torch.manual_seed(0)
    model, (x, y) = Beside(factor).eval(), batch()
    found, findings = scored(model, (x, y))
    truth = by_loop(model, lambda m, b: m(b[0]), (x, y), y)["body.weight"]
    torch.testing.assert_close(found["body.weight"], truth, rtol=1e-4, atol=float(1e-6 * truth.max()))
    assert not uncovered(caplog) and Axis(1, True) in findings.axes.values()


class Mixing(nn.Module):
    """Samples interact: in the logits, or in the gradients alone, by ``share``."""

    def __init__(self, visible: bool, share: float = 1.0) -> None:
        super().__init__()
        self.first, self.out, self.visible, self.share = nn.Linear(32, 32), nn.Linear(32, 4), visible, share

    def forward(self, x):
        h = torch.tanh(self.first(x[:, 0]))
        mean = self.share * h.mean(0)
        return 1e-3 * self.out(h - mean if self.visible else h - mean + mean.detach())


@pytest.mark.parametrize("dtype", HALVES)
def test_samples_that_interact_are_refused_in_16_bits(dtype):
    model = Mixing(visible=True).to(dtype)
    with torch.no_grad():
        model.out.weight *= 1e3
    with pytest.raises(TalosError, match="batch 0: logits change with the other samples"):
        sensitivities(model, [batch(dtype)])


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_alone_that_interact_are_seen_in_16_bits(dtype, share, caplog):
    """The gradients are a thousandth of what they are in other models, and still tell."""
    sensitivities(Mixing(visible=False, share=share).to(dtype), [batch(dtype)])
    assert uncovered(caplog) == ["first.weight", "first.bias"]
    assert "do not belong to one sample each" in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_rows_tell_whose_they_are_by_the_limits_of_fp16(seed):
    """Errors of 1 % are allowed; a row with some of another sample's gradient in it is not."""
    torch.manual_seed(seed)
    code = codes(2, torch.Generator().manual_seed(seed))
    gradient = torch.zeros(50, 2, 768)
    gradient[0] = torch.randn(2, 768)
    coded = gradient * code[:, None]
    rounded = coded * (1 + 0.01 * torch.randn(50, 2, 1).sign())
    assert consistent(row_values(rounded, 1)[0], *row_values(gradient, 1), code, HALF) == ([Axis(1, True)], True)
    mixed, mixed_coded = (one + 0.3 * one.flip(1) for one in (gradient, coded))
    assert consistent(row_values(mixed_coded, 1)[0], *row_values(mixed, 1), code, HALF) == ([], True)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "full"), (torch.float32, "bf16")])
def test_a_few_rows_in_16_bits_reach_the_operator_aligned(monkeypatch, dtype, precision):
    """Tokens of 3 entries would lie 6 bytes apart, which CUDA cannot copy 16 bytes at a time."""
    seen = []
    monkeypatch.setattr(uses, "accumulate_squared_per_sample_", lambda *given: seen.append(given) or accumulate(*given))
    rows = torch.tensor([2, 7, 16])
    inputs, grads = torch.randn(4, 5, 8).to(dtype), torch.randn(4, 5, 17).to(dtype)
    into = uses.Accumulator.zeros(torch.zeros(17, 8), torch.float32, None, rows)
    into.add_outer(uses.Outer(inputs, grads), precision)
    [(_, _, given)] = seen
    assert given.dtype == torch.bfloat16 and given.shape == (4, 5, 3)
    assert given.data_ptr() % 16 == 0 and [stride % 8 for stride in given.stride()] == [0, 0, 1]
    exact = torch.einsum("nto,nti->noi", grads[..., rows].bfloat16().double(), inputs.bfloat16().double())
    torch.testing.assert_close(into.values.double(), exact.square().sum(0), rtol=1e-5, atol=1e-5)
