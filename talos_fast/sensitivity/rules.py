"""One rule a torch function: its output, and the per-sample gradient of each parameter in it.

With X the input and G the gradient of the output of one sample, tokens t:

    linear, matmul, addmm, conv    W: Σ_t G_t ⊗ X_t       b: Σ_t G_t
    layer_norm, rms_norm           γ: Σ_t G_t ⊙ X̂_t       β: Σ_t G_t       (X̂ the normalised input)
    x + p, x · p                   p: Σ G,  Σ G ⊙ X        over the dimensions that p was broadcast along
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talos_fast.sensitivity.capture import Capture, Outer, PerSample, UncoveredError, rule


def _plain(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _reduced(capture: Capture, gradient: Tensor, shape: torch.Size) -> PerSample:
    """Sums (N·r, …) over everything but the samples and the trailing dimensions ``shape``, which broadcast."""
    tokens = capture.tokens(gradient, len(shape)).sum(1)
    broadcast = [dim + 1 for dim, size in enumerate(shape) if size == 1 and tokens.shape[dim + 1] != 1]
    return PerSample(tokens.sum(broadcast, keepdim=True) if broadcast else tokens)


@rule(F.linear)
def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b."""
    x = capture.tokens(input)
    output = F.linear(input, weight.detach(), _plain(bias))
    return capture.use(
        output,
        {
            weight: lambda g: Outer(x, capture.tokens(g)),
            bias: lambda g: PerSample(capture.tokens(g).sum(1)),
        },
        input,
    )


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def matmul(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
    """x W, W (I, O); the rows of W are the inputs, so the two sides of the outer product change places."""
    if other.dim() != 2 or capture.tracks(input):
        raise UncoveredError("a matmul in which the parameter is not a matrix on the right")
    x = capture.tokens(input)
    output = input @ other.detach()
    return capture.use(output, {other: lambda g: Outer(capture.tokens(g), x)}, input)


@rule(torch.addmm)
def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    """b + x W, as in GPT-2's Conv1D."""
    if scales or capture.tracks(mat1) or input.dim() != 1:
        raise UncoveredError("an addmm with scales, or with a parameter on the left")
    x = capture.tokens(mat1)
    output = torch.addmm(input.detach(), mat1, mat2.detach())
    return capture.use(
        output,
        {
            mat2: lambda g: Outer(capture.tokens(g), x),
            input: lambda g: PerSample(capture.tokens(g).sum(1)),
        },
        mat1,
    )


@rule(F.layer_norm)
def layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """γ X̂ + β, X̂ = (x - mean) / sqrt(var + eps)."""
    shape = torch.Size(normalized_shape)
    capture.tokens(input, len(shape))
    output = F.layer_norm(input, shape, _plain(weight), _plain(bias), eps)

    def scale(g: Tensor) -> PerSample:
        return _reduced(capture, g * F.layer_norm(input.detach(), shape, eps=eps), shape)

    return capture.use(output, {weight: scale, bias: lambda g: _reduced(capture, g, shape)}, input)


@rule(F.rms_norm)
def rms_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor, eps: float | None = None
) -> Tensor:
    """γ X̂, X̂ = x / sqrt(mean(x²) + eps)."""
    shape = torch.Size(normalized_shape)
    capture.tokens(input, len(shape))
    output = F.rms_norm(input, shape, weight.detach(), eps)

    def scale(g: Tensor) -> PerSample:
        return _reduced(capture, g * F.rms_norm(input.detach(), shape, eps=eps), shape)

    return capture.use(output, {weight: scale}, input)


def _split(capture: Capture, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(activation, parameter) of a commutative operation in which the parameter is broadcast over the samples."""
    parameter, activation = (first, second) if capture.tracks(first) else (second, first)
    if not isinstance(activation, Tensor) or capture.tracks(activation) or parameter.dim() >= activation.dim():
        raise UncoveredError("an elementwise operation that does not broadcast the parameter over the samples")
    capture.tokens(activation, parameter.dim())
    return activation, parameter


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
    """x ⊙ p: T5's RMS norm, layer scale."""
    x, parameter = _split(capture, input, other)
    output = x * parameter.detach()
    return capture.use(output, {parameter: lambda g: _reduced(capture, g * x.detach(), parameter.shape)}, x)


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
    """x + p: raw biases."""
    x, parameter = _split(capture, input, other)
    output = x + parameter.detach()
    return capture.use(output, {parameter: lambda g: _reduced(capture, g, parameter.shape)})


@rule(torch.conv2d)
def conv2d(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A linear map of unfolded patches; positions are its tokens."""
    if groups != 1 or isinstance(padding, str) or input.dim() != 4 or input.shape[0] != capture.samples:
        raise UncoveredError("a grouped or string-padded convolution, or one over something else than the samples")
    output = torch.conv2d(input, weight.detach(), _plain(bias), stride, padding, dilation)

    def kernel(g: Tensor) -> Outer:
        patches = F.unfold(input.detach(), weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
        return Outer(patches.transpose(1, 2), g.flatten(2).transpose(1, 2))

    return capture.use(output, {weight: kernel, bias: lambda g: PerSample(g.sum((2, 3)))}, input)


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@rule(F.multi_head_attention_forward)
def multi_head_attention(capture: Capture, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Self-attention of `nn.MultiheadAttention`: linear, SDPA, linear; activations are (T, N, E)."""
    a = _ATTENTION.bind(*args, **kwargs).arguments
    x: Tensor = a["query"]
    plain = x is a["key"] and x is a["value"] and x.dim() == 3 and x.shape[1] == capture.samples
    unusual = a.get("need_weights", True) or a.get("key_padding_mask") is not None or a.get("use_separate_proj_weight")
    if (
        not plain
        or unusual
        or a["bias_k"] is not None
        or a["add_zero_attn"]
        or (a.get("training", True) and a["dropout_p"])
    ):
        raise UncoveredError("attention other than plain self-attention without weights, padding and dropout")
    x = x.transpose(0, 1)
    samples, tokens, width = x.shape
    heads = a["num_heads"]
    projected: Any = linear(capture, x, a["in_proj_weight"], a["in_proj_bias"])
    q, k, v = projected.view(samples, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_additive(a.get("attn_mask"), samples, heads, q))
    output: Any = linear(
        capture, mixed.transpose(1, 2).reshape(samples, tokens, width), a["out_proj_weight"], a["out_proj_bias"]
    )
    return output.transpose(0, 1), None


def _additive(mask: Tensor | None, samples: int, heads: int, like: Tensor) -> Tensor | None:
    """`nn.MultiheadAttention`'s mask (True = hidden, (T, T) or (N·H, T, T)) as SDPA's additive one."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
    return mask.view(samples, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
