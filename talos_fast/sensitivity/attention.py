"""The rule of `nn.MultiheadAttention`, whose projections are hidden in one function, and of learned biases."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.registry import Split, UncoveredError, rule
from talos_fast.sensitivity.uses import Outer, PerSample

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@rule(F.multi_head_attention_forward)
def multi_head_attention(capture: Capture, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """softmax(q kᵀ/√d + mask) v between linear maps; activations are (T, N, E) or (T, E)."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = SimpleNamespace(**bound.arguments)
    if a.bias_k is not None or a.bias_v is not None or a.add_zero_attn or a.static_k is not None:
        raise UncoveredError("attention with keys and values of its own")
    if a.static_v is not None or (a.training and a.dropout_p) or a.query.dim() != 3:
        raise UncoveredError("attention with fixed values, dropout, or without a batch")
    tokens, samples, width = a.query.shape
    heads = a.num_heads
    q, k, v = (x.reshape(len(x), samples, heads, -1).permute(1, 2, 0, 3) for x in _projected(capture, a))
    bias = _bias(a, samples, q, k.shape[2])
    if a.need_weights:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        mixed = weights @ v
    else:
        weights, mixed = None, F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mixed = mixed.permute(2, 0, 1, 3).reshape(tokens, samples, width)
    output = _linear(capture, mixed, a.out_proj_weight, a.out_proj_bias)
    if weights is not None and a.average_attn_weights:
        weights = weights.mean(1)
    return output, weights


def _projected(capture: Capture, a: SimpleNamespace) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (T, N, E)."""
    width, inputs = a.query.shape[2], (a.query, a.key, a.value)
    weight, bias = a.in_proj_weight, a.in_proj_bias
    parts = [slice(n * width, (n + 1) * width) for n in range(3)]
    if a.use_separate_proj_weight:
        weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
        return tuple(
            _linear(capture, x, w, bias, slice(None), part) for x, w, part in zip(inputs, weights, parts, strict=True)
        )
    if a.key is a.value and a.query is a.key:
        return tuple(_linear(capture, a.query, weight, bias).chunk(3, -1))
    if a.key is a.value:
        rest = slice(width, 3 * width)
        keys, values = _linear(capture, a.key, weight, bias, rest, rest).chunk(2, -1)
        return _linear(capture, a.query, weight, bias, parts[0], parts[0]), keys, values
    return tuple(_linear(capture, x, weight, bias, part, part) for x, part in zip(inputs, parts, strict=True))


def _linear(
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice = slice(None),
    entries: slice = slice(None),
) -> Tensor:  # fmt: skip
    """x Wᵀ + b with some rows of W and some entries of b."""
    alias = capture.alias(weight)
    if alias is not None and alias.function is not None:
        raise UncoveredError("attention with a projection that is computed")
    output = F.linear(x, weight[rows], None if bias is None else bias[entries])
    first = (rows.start or 0) * weight.shape[1]

    def shift(g: Tensor, split: Split) -> PerSample:
        total = split(g).sum(1)
        assert bias is not None
        before, after = entries.start or 0, len(bias) - (entries.stop or len(bias))
        return PerSample(F.pad(total, (before, after)))

    return capture.use(output, {weight: lambda g, split: Outer(split(x), split(g), first), bias: shift}, x)


def _bias(a: SimpleNamespace, samples: int, like: Tensor, keys: int) -> Tensor | None:
    """Both masks as one additive one, broadcastable to (N, heads, T, keys); True means hidden."""
    total = None
    attention, padding = a.attn_mask, a.key_padding_mask
    if attention is None and a.is_causal:
        attention = torch.ones(like.shape[2], keys, dtype=torch.bool, device=like.device).triu(1)
    if attention is not None:
        total = _additive(attention, like)
        if total.dim() == 3:
            total = total.view(samples, -1, *total.shape[1:])
    if padding is not None:
        hidden = _additive(padding, like).view(samples, 1, 1, keys)
        total = hidden if total is None else total + hidden
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    capture: Capture, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """A learned bias of the scores, such as T5's relative positions, expanded to one copy a sample."""
    if attn_mask is None or capture.alias(attn_mask) is None:
        raise UncoveredError("attention in which the parameter is not the bias")
    copy = capture.expand(attn_mask, (*query.shape[:-1], key.shape[-2]))
    return F.scaled_dot_product_attention(query, key, value, copy, *args, **kwargs)
