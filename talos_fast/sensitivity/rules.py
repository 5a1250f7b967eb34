"""One rule a torch function: its output, and the per-sample gradient of each parameter in it.

With X the input and G the gradient of the output of one sample, tokens t:

    linear, matmul, addmm, conv    W: Σ_t G_t ⊗ X_t       b: Σ_t G_t
    embedding                      W: G_t at row id_t
    layer, RMS, batch, group norm  γ: Σ_t G_t ⊙ X̂_t       β: Σ_t G_t       (X̂ the normalised input)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.registry import Make, Split, UncoveredError, rule
from talos_fast.sensitivity.uses import Lookup, Outer, PerSample


def _sum(g: Tensor, split: Split) -> PerSample:
    return PerSample(split(g).sum(1))


@rule(F.linear)
def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b."""
    if weight.dim() != 2 or input.is_complex():
        raise UncoveredError("a linear map with a vector, or of complex numbers")
    capture.matrix(weight)
    output = F.linear(input, weight, bias)
    return capture.use(output, {weight: lambda g, split: Outer(split(input), split(g)), bias: _sum}, input)


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def matmul(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
    """x W, W (I, O); the rows of W are the inputs, so the two sides of the outer product change places."""
    if other.dim() != 2 or capture.alias(input) is not None or input.dim() < 2 or input.is_complex():
        raise UncoveredError("a matmul in which the parameter is not a matrix on the right")
    capture.matrix(other)
    output = input @ other
    return capture.use(output, {other: lambda g, split: Outer(split(g), split(input))}, input)


@rule(torch.addmm)
def addmm(capture: Capture, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor:
    """b + x W, as in GPT-2's Conv1D."""
    if scales or capture.alias(mat1) is not None or input.dim() != 1:
        raise UncoveredError("an addmm with scales, or with a parameter on the left")
    capture.matrix(mat2)
    output = torch.addmm(input, mat1, mat2)
    return capture.use(output, {mat2: lambda g, split: Outer(split(g), split(mat1)), input: _sum}, mat1)


@rule(F.embedding)
def embedding(
    capture: Capture, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of W, one a token id; the row ``padding_idx`` gets no gradient."""
    alias = capture.alias(weight)
    if alias is None or alias.function is not None or max_norm is not None or scale_grad_by_freq:
        raise UncoveredError("an embedding that rescales its table or its gradient, or whose table is computed")
    output = F.embedding(input, weight, padding_idx)
    padding = None if padding_idx is None else padding_idx % len(weight)

    def rows(g: Tensor, split: Split) -> Lookup:
        if padding is not None:
            g = g.masked_fill((input == padding).unsqueeze(-1), 0.0)
        return Lookup(split(input, features=0), split(g))

    return capture.use(output, {weight: rows}, input)


def _scaled(split_features: int, normalized: Callable[[], Tensor]) -> tuple[Make, Make]:
    """The formulas of γ and β, for a normalised input in the order of the gradient."""

    def scale(g: Tensor, split: Split) -> PerSample:
        return PerSample(split(g * normalized(), features=split_features).sum(1))

    return scale, lambda g, split: PerSample(split(g, features=split_features).sum(1))


@rule(F.layer_norm)
def layer_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """γ X̂ + β, X̂ = (x - mean) / sqrt(var + eps)."""
    shape = list(normalized_shape)
    output = F.layer_norm(input, shape, weight, bias, eps)
    scale, shift = _scaled(len(shape), lambda: F.layer_norm(input.detach(), shape, eps=eps))
    return capture.use(output, {weight: scale, bias: shift}, input, features=len(shape))


@rule(F.rms_norm)
def rms_norm(
    capture: Capture, input: Tensor, normalized_shape: list[int], weight: Tensor, eps: float | None = None
) -> Tensor:
    """γ X̂, X̂ = x / sqrt(mean(x²) + eps)."""
    shape = list(normalized_shape)
    output = F.rms_norm(input, shape, weight, eps)
    scale, _ = _scaled(len(shape), lambda: F.rms_norm(input.detach(), shape, eps=eps))
    return capture.use(output, {weight: scale}, input, features=len(shape))


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1)


@rule(F.batch_norm)
def batch_norm(
    capture: Capture, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """γ X̂ + β a channel, X̂ normalised by running statistics.

    Raises:
        TalosError: statistics of the batch, which mix its samples.
    """
    if training or running_mean is None or running_var is None:
        names = [alias.name for alias in map(capture.alias, (weight, bias)) if alias is not None]
        raise TalosError(
            f"the batch norm of {names} uses the statistics of the batch, so its samples have no gradients of their "
            "own; calibrate in evaluation mode, with running statistics"
        )
    output = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    scale, shift = _scaled(1, lambda: _channels_last(F.batch_norm(input.detach(), running_mean, running_var, eps=eps)))
    return capture.use(output, {weight: scale, bias: shift}, input, view=_channels_last)


@rule(F.group_norm)
def group_norm(
    capture: Capture, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """γ X̂ + β a channel, X̂ normalised within the groups of channels of one sample."""
    output = F.group_norm(input, num_groups, weight, bias, eps)
    scale, shift = _scaled(1, lambda: _channels_last(F.group_norm(input.detach(), num_groups, eps=eps)))
    return capture.use(output, {weight: scale, bias: shift}, input, view=_channels_last)


@rule(torch.conv2d)
def conv2d(
    capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """A linear map of unfolded patches; positions are its tokens."""
    if groups != 1 or isinstance(padding, str) or input.dim() != 4:
        raise UncoveredError("a convolution with groups, padding by name, or an input without a batch")
    capture.matrix(weight)
    output = torch.conv2d(input, weight, bias, stride, padding, dilation)
    high, wide = output.shape[2:]

    def kernel(g: Tensor, split: Split) -> Outer:
        patches = F.unfold(input.detach(), weight.shape[2:], dilation=dilation, padding=padding, stride=stride)
        return Outer(split(patches.transpose(1, 2).unflatten(1, (high, wide))), split(g))

    return capture.use(output, {weight: kernel, bias: _sum}, input, view=_channels_last)
