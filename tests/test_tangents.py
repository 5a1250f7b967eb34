"""The linearized pass against torch.func.jvp in float64, and the products it takes, counted: none is wasted."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from methods_cases import case
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from talos_fast.errors import TalosError
from talos_fast.forward import default_forward
from talos_fast.linear import Linearized
from talos_fast.tangents import LowRank, Tangents
from talos_fast.task_vector import TaskVector

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NEAR = {"rtol": 1e-8, "atol": 1e-10}
N, SIZES = 5, (7, 11, 13, 3)
PRODUCTS = [2 * N * i * o for i, o in itertools.pairwise(SIZES)]


class Chain(nn.Module):
    """Linear maps, and between them what has no products but saves values that have tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(SIZES))

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x))
            x = x / x.norm(dim=-1, keepdim=True)
        return x


def test_a_forward_that_asks_for_a_part_of_the_model_is_told_why_it_cannot():
    line = Linearized(nn.Sequential(nn.Linear(2, 2)), dict)
    with pytest.raises(AttributeError, match="no attribute 'encode_image': for a linear method forward= must call the"):
        line.encode_image(torch.zeros(1, 2))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def distances(x):
    return torch.cdist(x, torch.zeros(3, 4))


@pytest.mark.parametrize(
    "function, why",
    [
        (distances, "Trying to use forward AD with _cdist_forward.*"),
        (Doubled.apply, "You must implement the jvp function.*"),
    ],
)
def test_an_operation_without_a_forward_mode_is_named(function, why):
    class Model(nn.Linear):
        def forward(self, x):
            return function(super().forward(x))

    line = Linearized(Model(2, 4), {"weight": torch.ones(4, 2)}.copy)
    with pytest.raises(TalosError, match=f"cannot be linearized: {why}; use another implementation"):
        line(torch.ones(1, 2))


def test_what_else_is_not_implemented_is_the_model_s_own_word():
    class Refusing(nn.Linear):
        def forward(self, x):
            raise NotImplementedError("for such inputs")

    line = Linearized(Refusing(2, 4), {"weight": torch.ones(4, 2)}.copy)
    with pytest.raises(NotImplementedError, match="^for such inputs$"):
        line(torch.ones(1, 2))


def counted(line: Linearized, x: torch.Tensor) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    with line.around():
        with FlopCounterMode(display=False) as forward:
            loss = line(x).square().sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_a_direction_of_everything_takes_three_products_forward_and_two_backward():
    model = Chain()
    tangents = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    forward, backward = counted(Linearized(model, lambda: tangents), torch.randn(N, SIZES[0]))
    whole, chained = sum(PRODUCTS), sum(PRODUCTS[1:])  # the input of the first layer has no tangent
    assert forward == 2 * whole + chained
    assert backward == whole + chained


def test_factors_take_no_product_of_full_size_but_the_chain_s():
    """Below the first factor there is no tangent, and no frozen weight is multiplied by a tangent of zero."""
    model, rank = Chain(), 2
    b, a = torch.randn(4, rank, requires_grad=True), torch.randn(rank, 11)
    direction = LowRank((13, 11), ((slice(3, 7), b, a),))
    forward, backward = counted(Linearized(model, lambda: {"layers.1.weight": direction}), torch.randn(N, SIZES[0]))
    down, up = 2 * N * 11 * rank, 2 * N * rank * 4
    assert forward == sum(PRODUCTS) + PRODUCTS[2] + down + up
    assert backward == PRODUCTS[2] + up
    assert b.grad.abs().sum() > 0


def test_attention_takes_six_products_forward_and_four_backward():
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    tokens, batch = 5, 3
    tangents = {n: torch.randn_like(p).requires_grad_() for n, p in layer.named_parameters()}

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x, need_weights=False)[0]

    line = Linearized(Self(), lambda: {f"layer.{name}": t for name, t in tangents.items()})
    forward, backward = counted(line, torch.randn(batch, tokens, 16))
    inside, outside = 2 * batch * tokens * 16 * 48, 2 * batch * tokens * 16 * 16
    scores = 2 * (batch * 2) * tokens * tokens * 8
    assert forward == 2 * inside + 3 * outside + 6 * scores
    assert backward == inside + 2 * outside + 4 * scores


def reference(function, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, primals, tangents)


MASKS = {
    "none": {}, "causal": {"is_causal": True}, "scaled": {"scale": 0.3}, "grouped": {"enable_gqa": True},
    "bool": {"attn_mask": torch.tensor([[True, True, False], [False, False, True], [True, False, True]])},
    "float": {"attn_mask": torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))},
}  # fmt: skip


@pytest.mark.parametrize("moving", [(0, 1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_the_derivative_of_torch_s(mask, moving):
    heads = 4 if mask == "grouped" else 2
    primals = [torch.randn(2, h, 3, 4, dtype=torch.float64) for h in (heads, 2, 2)]
    tangents = [torch.randn_like(p).requires_grad_() for p in primals]

    def attend(*moved):
        inputs = list(primals)
        for place, value in zip(moving, moved, strict=True):
            inputs[place] = value
        return F.scaled_dot_product_attention(*inputs, **MASKS[mask])

    chosen = tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
    value, slope = reference(attend, *chosen)
    with Tangents({}):
        mine, mine_slope = torch.func.jvp(attend, *chosen)
    torch.testing.assert_close(mine, value, **EXACT)
    torch.testing.assert_close(mine_slope, slope, **EXACT)
    cotangent = torch.randn_like(slope)
    found, expected = (torch.autograd.grad(s, chosen[1], cotangent) for s in (mine_slope, slope))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_row_that_sees_nothing_is_zero_as_torch_has_it():
    """And so are its gradients, which torch gives as NaN."""
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    tangent = torch.randn_like(q).requires_grad_()
    mask = torch.tensor([True, False, True])[:, None].expand(3, 3)
    with Tangents({}):
        value, slope = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v, mask), (q,), (tangent,))
    assert torch.equal(value[:, 1], torch.zeros_like(value[:, 1])) and not slope[:, 1].any() and slope.isfinite().all()
    torch.testing.assert_close(value, F.scaled_dot_product_attention(q, k, v, mask), **EXACT)
    (gradient,) = torch.autograd.grad(slope.sum(), tangent)
    assert gradient.isfinite().all() and not gradient[:, 1].any()


def test_attention_with_dropout_drops_what_torch_drops():
    """Some models ask for it in evaluation mode too."""
    q, k, v, t = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(4))
    attend = lambda q: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)  # noqa: E731
    torch.manual_seed(1)
    expected = reference(attend, (q,), (t,))
    torch.manual_seed(1)
    with Tangents({}):
        found = torch.func.jvp(attend, (q,), (t,))
    torch.testing.assert_close(found, expected, **EXACT)


def test_factors_are_seen_in_a_list_of_weights():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x):
            return x @ torch.cat([self.one.weight, self.other.weight]).t()

    model, x = Joined(), torch.randn(4, 3, dtype=torch.float64)
    direction = LowRank((2, 3), ((slice(0, 2), torch.randn(2, 1).double(), torch.randn(1, 3).double()),))
    found, dense = (Linearized(model, lambda d=d: {"other.weight": d})(x) for d in (direction, direction.dense()))
    assert not torch.equal(dense, model(x))
    torch.testing.assert_close(found, dense, **EXACT)


def test_an_activation_that_is_asked_for_its_gradient_passes_that_of_the_direction():
    class Asking(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).requires_grad_().sin())

    model, tangent = Asking(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3, requires_grad=True)
    out = Linearized(model, lambda: {"0.weight": tangent})(torch.randn(5, 3))
    (gradient,) = torch.autograd.grad(out.sum(), tangent)
    assert gradient.abs().sum() > 0


def test_products_may_be_given_their_arguments_by_name():
    x, w, t = (torch.randn(3, 3, dtype=torch.float64) for _ in range(3))
    for product in (lambda w: torch.matmul(x, other=w), lambda w: F.linear(input=x, weight=w, bias=w[0])):
        with Tangents({}):
            found = torch.func.jvp(product, (w,), (t,))
        torch.testing.assert_close(found, torch.func.jvp(product, (w,), (t,)), **EXACT)


def test_a_layer_norm_in_bfloat16_is_derived_in_float32():
    x, t = (50 + torch.randn(4, 64)).bfloat16(), torch.randn(4, 64).bfloat16()
    norm = lambda x: F.layer_norm(x, (64,))  # noqa: E731
    with Tangents({}):
        _, found = torch.func.jvp(norm, (x,), (t,))
    _, expected = torch.func.jvp(norm, (x.double(),), (t.double(),))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_bias_of_a_convolution_has_its_tangent():
    x, w, b, t = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5, 4), (4, 3, 2, 2), (4,), (4,)))
    convolve = lambda b: F.conv2d(x, w, b, stride=(1, 1))  # noqa: E731
    with Tangents({}):
        found = torch.func.jvp(convolve, (b,), (t,))
    torch.testing.assert_close(found, torch.func.jvp(convolve, (b,), (t,)), **EXACT)


def test_a_learned_mask_has_its_tangent():
    q, k, v = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    mask, dmask = (torch.randn(3, 3, dtype=torch.float64) for _ in range(2))
    attend = lambda m: F.scaled_dot_product_attention(q, k, v, m)  # noqa: E731
    expected = reference(attend, (mask,), (dmask,))
    with Tangents({}):
        found = torch.func.jvp(attend, (mask,), (dmask,))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("kind", ["clip", "timm", "bert", "t5"])
def test_factors_are_the_dense_direction(kind, tmp_path):
    model, batches = case(kind, tmp_path, torch.float64)
    names = [name for name, p in model.named_parameters() if name.endswith(("in_proj_weight", "qkv.weight", "q.weight",
             "query.weight", "shared.weight", "proj"))]  # fmt: skip
    factors, parameters = {}, dict(model.named_parameters())
    for name in names:
        outs, ins = parameters[name].shape
        terms = []
        for rows in (slice(0, outs // 3), slice(outs // 2, outs)):
            b = torch.randn(len(range(*rows.indices(outs))), 2, dtype=torch.float64, requires_grad=True)
            terms.append((rows, b, torch.randn(2, ins, dtype=torch.float64)))
        factors[name] = LowRank((outs, ins), tuple(terms))
    leaves = [b for direction in factors.values() for _, b, _ in direction.terms]
    results = []
    for directions in (factors, {name: direction.dense() for name, direction in factors.items()}):
        out = default_forward(Linearized(model, lambda directions=directions: directions), batches[0])
        results.append((out, torch.autograd.grad(out.sin().sum(), leaves)))
    assert names and all(g.abs().max() > 0 for g in results[0][1])
    torch.testing.assert_close(results[0], results[1], **({"rtol": 1e-4, "atol": 1e-5} if kind == "t5" else NEAR))


def test_a_model_inside_may_be_cast_by_itself():
    model, tuned, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    line = Linearized.along(model, TaskVector(model, tuned))
    expected = line(x)
    with torch.inference_mode():
        assert torch.equal(line(x), expected)
    model.eval()
    line(x)
    assert not model.training, "as it was"
    model.double()
    torch.testing.assert_close(line(x.double()).float(), expected)
    line.revert()
    assert torch.equal(line(x.double()), model(x.double()))
    with pytest.raises(TalosError, match="must be a finite number"):
        line.move(float("nan"))


def test_the_model_is_as_before_even_after_an_error():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            if x.sum() > 0:
                raise RuntimeError("no")
            return self.weight * x

    model = Failing().train()
    weight, line = model.weight, Linearized(model, lambda: {"weight": torch.ones(2)})
    with pytest.raises(RuntimeError, match="no"), line.around():
        line(torch.ones(2))
    assert model.weight is weight and model.training and isinstance(model.weight, nn.Parameter)
    assert torch.equal(line(-torch.ones(2)), torch.full((2,), -2.0))
    line.alpha = 0.0
    assert torch.equal(line(-torch.ones(2)), torch.full((2,), -1.0))


@pytest.mark.parametrize("count, moving", [(1, (0,)), (2, (0,)), (2, (0, 1)), (3, (0,)), (3, (0, 1)), (3, (1,)),
                                           (3, (2,)), (3, (0, 1, 2))], ids=str)  # fmt: skip
def test_a_layer_norm_is_the_derivative_of_torch_s(count, moving):
    """Without weight and bias, with a weight alone, and with both."""
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    primals = [x, *(torch.randn(3, 4, dtype=torch.float64) for _ in range(count - 1))]
    tangents = [torch.randn_like(p).requires_grad_() for p in primals]

    def norm(*moved):
        inputs = list(primals)
        for place, value in zip(moving, moved, strict=True):
            inputs[place] = value
        return F.layer_norm(inputs[0], (3, 4), *inputs[1:], eps=1e-3)

    chosen = tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
    value, slope = torch.func.jvp(norm, *chosen)
    with Tangents({}):
        mine, mine_slope = torch.func.jvp(norm, *chosen)
    torch.testing.assert_close(mine, value, **EXACT)
    torch.testing.assert_close(mine_slope, slope, **EXACT)
    cotangent = torch.randn_like(slope)
    found, expected = (torch.autograd.grad(s, chosen[1], cotangent) for s in (mine_slope, slope))
    torch.testing.assert_close(found, expected, **EXACT)
