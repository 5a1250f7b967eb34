"""Odd uses of a parameter: scored exactly, by a rule or by torch.func."""

import copy

import pytest
import torch
from oracles import assert_equal, data, randomized, scores, uncovered
from sensitivity_cases import Net, expected
from torch import nn
from torch.nn import functional as F

from talos_fast.sensitivity.selection import maskable_parameters

pytestmark = pytest.mark.usefixtures("logged")


def mapped(layer, x):
    return torch.vmap(lambda row: torch.tanh(F.linear(row, layer.weight, layer.bias)))(x)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_first_output_may_be_written_to(samples, caplog):
    """Of three dimensions it is a view, and nothing before it has a gradient."""
    model = randomized(Net(lambda layer, x: F.relu(layer(x), inplace=True)))
    batch = data(samples, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert not uncovered(caplog)


@pytest.mark.parametrize("samples", [1, 4])
def test_an_output_that_is_a_view_may_be_written_to(samples, caplog):
    """As Longformer scales its queries; one sample alone loses the place that a hook is put on."""

    def scaled(layer, x):
        rows = layer(
            layer(x).tanh().transpose(0, 1).contiguous()
        )  # of the first layer nothing before it has a gradient
        rows *= 0.5
        return rows.transpose(0, 1).tanh()

    model, batch = randomized(Net(scaled)), data(samples, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert not uncovered(caplog)


def test_a_transform_of_torch_func_inside_the_model(caplog):
    model, batch = randomized(Net(mapped)), data(4, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert uncovered(caplog) == ["first.weight", "first.bias"] and "a transform of torch.func" in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_model_is_left_to_torch_func(caplog):
    model, batch = randomized(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))), data(4, 6)
    traced = torch.jit.trace(model, batch[0])
    assert_equal(scores(traced, batch), expected(model, batch))
    assert len(uncovered(caplog)) == 4


def test_a_parameter_without_entries():
    model, batch = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(4, 3, 6)
    model.nothing = nn.Parameter(torch.zeros(0, 6).double())
    found = scores(model, batch)
    assert found.pop("nothing").shape == (0, 6)
    assert_equal(found, expected(model, batch))


def test_rounding_to_bfloat16_is_not_taken_for_a_wrong_rule(caplog):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Flatten(), nn.Linear(160, 4))
    x, y = torch.randn(4, 5, 32), torch.randint(0, 4, (4,))
    exact = scores(model.double(), (x.double(), y))
    for name, score in scores(model.bfloat16(), (x.bfloat16(), y)).items():
        assert score.dtype is torch.float32 and (score - exact[name]).abs().max() < 0.2 * exact[name].max(), name
    assert not uncovered(caplog)


ODD = {
    "a vector": (lambda m, x: (F.linear(x, m.p[0]).softmax(-1)[..., None] * x).sum(1), (1, 6)),
    "complex numbers": (lambda m, x: F.linear(torch.fft.fft(x, dim=1), m.p.to(torch.complex128)).abs().sum(1), (6, 6)),
    "a complex product": (lambda m, x: (torch.fft.fft(x, dim=1) @ m.p.to(torch.complex128)).abs().sum(1), (6, 6)),
    "broadcast_to(*sizes)": (lambda m, x: (x + m.p.broadcast_to(len(x), 3, 6)).tanh().sum(1), (3, 6)),
    "repeat(repeats=)": (lambda m, x: (x + m.p.repeat(repeats=(len(x), 1, 1))).tanh().sum(1), (3, 6)),
    "no features": (lambda m, x: torch.cat([F.linear(x, m.p[:0]), x.tanh() * m.p[0]], -1).sum(1), (1, 6)),
}


@pytest.mark.parametrize("use", ODD)
def test_odd_uses_of_a_parameter(use):
    class Odd(nn.Module):
        def __init__(self, shape) -> None:
            super().__init__()
            self.p, self.out = nn.Parameter(torch.randn(shape)), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(ODD[use][0](self, x))

    model, batch = randomized(Odd(ODD[use][1])), data(4, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_tables(bag):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(4, 6, sparse=True) if bag else nn.Embedding(4, 6, sparse=True)
            self.out = nn.Linear(6, 4)

        def forward(self, x):
            rows = self.table((x[..., 0] > 0).long())
            return self.out(rows if bag else rows.tanh().sum(1))

    model, batch = randomized(Table()), data(4, 3, 6)
    dense = copy.deepcopy(model)
    dense.table.sparse = False
    assert_equal(scores(model, batch), expected(dense, batch))


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "dinov2", "xlnet"])
def test_tables_of_positions_and_tokens_stay_frozen(name):
    names = {
        "tnt_s_patch16_224": ["encoder.patch_pos", "encoder.pixel_pos"],
        "dinov2": ["encoder.embeddings.register_tokens", "embeddings.mask_token"],
        "xlnet": ["transformer.mask_emb"],
    }[name]
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    for full in names:
        *path, last = full.split(".")
        owner = model
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    assert set(maskable_parameters(model)) == {"linear.weight", "linear.bias"}
