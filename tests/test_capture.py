"""How capture finds uses and whose rows they hold, on networks made to mislead it; float64, against vmap(grad)."""

import pytest
import torch
from oracles import assert_equal, by_loop, by_vmap, data, logit, randomized, scores, uncovered
from torch import nn
from torch.nn import functional as F

from talos_fast.sensitivity import ALIASING, RULES, PerSample, UncoveredError, rule
from talos_fast.sensitivity.axis import Axis, codes, consistent, row_values

pytestmark = pytest.mark.usefixtures("logged")


def expected(model, *batches):
    parts = [by_vmap(model, logit, batch) for batch in batches]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


class Layouts(nn.Module):
    """The same tokens in every order, through linear layers and a norm; ``pool`` picks or sums tokens."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.norm, self.out, self.pool = nn.LayerNorm(5), nn.Linear(5, 4), pool

    def forward(self, x):
        n, t, f = x.shape
        usual, first, merged, twisted = self.layers
        x = torch.tanh(usual(x)).transpose(0, 1)
        x = self.norm(torch.tanh(first(x)))
        x = torch.tanh(twisted(x.reshape(t * n, f))).view(t, n, f).transpose(0, 1)
        return self.out(self.pool(merged(x.reshape(n * t, f)).view(n, t, f)))


@pytest.mark.parametrize("pool", [lambda x: x[:, 0], lambda x: x.sum(1)], ids=["first token", "all tokens"])
@pytest.mark.parametrize("samples, tokens", [(4, 4), (4, 5), (3, 6), (2, 9), (16, 17), (1, 3), (4, 1)])
def test_the_batch_axis_is_found_in_every_layout(samples, tokens, pool, caplog):
    """Also where N = T, and where T = 1 mod N and only first tokens have a gradient, so that both orders fit."""
    model, batch = randomized(Layouts(pool)), data(samples, tokens, 5)
    assert_equal(scores(model, batch), expected(model, batch))
    assert not uncovered(caplog)


class Placed(nn.Module):
    """Each sample reads the one token that its first feature marks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1)
        return self.out((h * (x[..., :1] == 9).to(h.dtype)).sum(1))


@pytest.mark.parametrize("repeats", [1, 2])
def test_rows_that_fit_two_axes_are_looked_at_again(repeats, caplog):
    """Sample n reads token n, so the rows with a gradient are a diagonal. In the next batch they are not."""
    model, batches = randomized(Placed()), []
    for places in ([0, 1, 2, 3], [2, 2, 0, 1]):
        x, y = data(4, 4, 5)
        x[range(4), places, 0] = 9
        batches.append((x, y))
    assert_equal(scores(model, *batches, samples_per_input=repeats), expected(model, *batches))
    assert not uncovered(caplog)


@pytest.mark.parametrize("seed", range(20))
def test_one_wide_row_a_sample_is_enough(seed):
    """Sums with random signs are small against what they sum: every row must still tell whose it is."""
    torch.manual_seed(seed)
    code = codes(2, torch.Generator().manual_seed(seed))
    gradient = torch.zeros(50, 2, 768)
    gradient[0] = torch.randn(2, 768)
    coded, _ = row_values(gradient * code[:, None], 1)
    assert consistent(coded, *row_values(gradient, 1), code) == ([Axis(1, True)], True)


def test_codes_tell_axes_apart():
    assert Axis(1, True).tokens(torch.arange(12).view(2, 3, 2), 3).tolist() == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [10, 11]],
    ]
    assert Axis(0, False).owners((6,), 3, torch.device("cpu")).tolist() == [0, 1, 2, 0, 1, 2]
    assert Axis(0, True).owners((6, 2), 3, torch.device("cpu")).tolist() == [[0], [0], [1], [1], [2], [2]]


class Routed(nn.Module):
    """Tokens go to experts by their sign: how many of a sample's tokens an expert sees depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)]), nn.Linear(5, 4)

    def forward(self, x):
        h, chosen = torch.zeros_like(x), x[..., 0] > 0
        for expert, mine in zip(self.experts, (chosen, ~chosen), strict=True):
            h = h.masked_scatter(mine[..., None], torch.tanh(expert(x[mine])))
        return self.out(h.sum(1))


def test_rows_chosen_by_the_data_are_not_captured(caplog):
    model, (x, y) = randomized(Routed()), data(4, 4, 5)
    x[..., 0] = torch.tensor([[1, 1, -1, -1], [1, -1, -1, -1], [1, 1, 1, -1], [1, 1, -1, -1]])  # 8 tokens each
    assert_equal(scores(model, (x, y)), by_loop(model, lambda m, b: m(b[0]), (x, y), y))
    assert {"experts.0.weight", "experts.1.bias"} <= set(uncovered(caplog))
    assert "out.weight" not in uncovered(caplog)


class Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() @ w.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class Odd(nn.Module):
    """One unusual use of ``p`` (5, 5) after another; ``how`` names it."""

    def __init__(self, how) -> None:
        super().__init__()
        self.p, self.out, self.how = nn.Parameter(torch.randn(5, 5)), nn.Linear(5, 4), how

    def forward(self, x):
        return self.out(torch.tanh(self.how(x, self.p)))


def written(x, p):
    buffer = torch.zeros(5, 5).to(x)
    buffer[:] = p
    return x @ buffer


# How p is used, and whether capture covers it.
USES = {
    "transposed on the right": (lambda x, p: x @ p.t(), True),
    "transposed property in linear": (lambda x, p: F.linear(x, p.T), True),
    "cast and cast back": (lambda x, p: F.linear(x, p.double().contiguous()), True),
    "rows": (lambda x, p: torch.cat([F.linear(x, p[:2]), F.linear(x, p[2:])], -1), True),
    "columns": (lambda x, p: torch.cat([x @ p[:, :2], x @ p[:, 2:]], -1), False),
    "chunks of rows": (lambda x, p: torch.cat([F.linear(x, part) for part in p.chunk(2)], -1), True),
    "one row as a bias": (lambda x, p: x * (1.0 + p[0]) + p[1] - p[2:3], True),
    "two uses of one row": (lambda x, p: x * p[0].exp() + p[0], True),
    "softplus of all": (lambda x, p: x + F.softplus(p).reshape(-1)[:5], True),
    "expanded": (lambda x, p: torch.cat([x[:, None], p.expand(len(x), 5, 5)], 1).sum(1), True),
    "repeated": (lambda x, p: x + p[None].repeat(len(x), 1, 1).sum(1), True),
    "in place": (lambda x, p: x.clone().mul_(p[0]).add_(p[1]), True),
    "where": (lambda x, p: torch.where(x > 0, x, p[3]).masked_fill(x > 2, 0.0), True),
    "as the matrix on the left": (lambda x, p: (p @ x.t()).t(), False),
    "a computed matrix": (lambda x, p: F.linear(x, p.tanh()), False),
    "both sides of a product": (lambda x, p: x @ (p @ p), False),
    "an inverse": (lambda x, p: x @ torch.linalg.inv(p), False),
    "written into a buffer": (written, False),
    "a hidden kernel": (lambda x, p: Hidden.apply(x, p), False),
    "as an activation": (lambda x, p: x + F.linear(p[:1], torch.ones(5, 5).double()), False),
}


@pytest.mark.parametrize("name", USES)
def test_no_use_is_taken_for_zero(name, caplog):
    how, covered = USES[name]
    model, batch = randomized(Odd(how)), data(5, 5)
    found = scores(model, batch)
    assert_equal(found, by_loop(model, lambda m, b: m(b[0]), batch, batch[1]))
    assert ("p" in uncovered(caplog)) is not covered


def test_a_detached_use_has_no_gradient():
    model, batch = randomized(Odd(lambda x, p: x @ p.detach() + x @ p.data)), data(5, 5)
    assert scores(model, batch)["p"].max() == 0


def test_an_input_modified_in_place_is_noticed(caplog):
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            h = x * 2
            y = self.first(h)
            if len(x) > 2:  # more samples than are examined
                h.mul_(1.0)
            return self.out(torch.tanh(y) + h)

    model, batch = randomized(Writing()), data(4, 5)
    assert_equal(scores(model, batch), expected(model, batch))
    assert uncovered(caplog) == ["first.weight", "first.bias"] and "modified in place" in caplog.text


def test_users_add_rules_and_a_wrong_rule_is_found_out(caplog):
    class Curved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.out = nn.PReLU(), nn.Linear(5, 4)

        def forward(self, x):
            return self.out(F.prelu(x, self.slope.weight))

    model, batch = randomized(Curved()), data(4, 3, 5)
    model.out = nn.Sequential(nn.Flatten(), nn.Linear(15, 4)).double()
    truth = expected(model, batch)
    assert_equal(scores(model, batch), truth)
    assert uncovered(caplog) == ["slope.weight"]
    caplog.clear()
    factor = 1.0

    @rule(F.prelu)
    def prelu(capture, input, weight):
        if weight.numel() != 1:
            raise UncoveredError("a slope a channel")
        negative = factor * input.detach().clamp(max=0)
        make = lambda g, split: PerSample(split(g * negative).sum((1, 2))[:, None])  # noqa: E731
        return capture.use(F.prelu(input, weight), {weight: make})

    try:
        assert_equal(scores(model, batch), truth)
        assert not uncovered(caplog)
        factor = 1.5
        assert_equal(scores(model, batch), truth)
        assert uncovered(caplog) == ["slope.weight"] and "disagrees" in caplog.text
    finally:
        del RULES[F.prelu]


def test_a_rule_that_forgets_a_parameter_leaves_it_uncovered(caplog):
    """F.linear's rule knows weights; a parameter that comes in as the activation must not be lost."""
    model, batch = randomized(Odd(lambda x, p: x + F.linear(p[0:1], torch.eye(5).double()))), data(4, 5)
    assert_equal(scores(model, batch), expected(model, batch))
    assert uncovered(caplog) == ["p"]
    assert F.linear not in ALIASING
