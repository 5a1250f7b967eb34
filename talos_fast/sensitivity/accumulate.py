"""The operator ``talos_fast::accumulate_squared_per_sample_``: its checks, and its reference in plain torch."""

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.errors import TalosError

_SCHEMA = (
    "accumulate_squared_per_sample_(Tensor(a!) scores, Tensor inputs, Tensor grad_outputs, Tensor? scale=None) -> ()"
)
_INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Entries of one sample's product that exist at a time: 2 MiB of fp32, so it is squared while in cache.
_BLOCK = 2**19
# Entries of all samples' products that are cheaper held at once than launched for.
_SMALL = 2**20


def accumulate_squared_per_sample_(
    scores: Tensor, inputs: Tensor, grad_outputs: Tensor, *, precision: torch.dtype | None = None
) -> Tensor:
    """Adds every sample's squared weight gradient of a linear map to ``scores``, in place.

    ``scores[o, i] += sum_n (sum_t grad_outputs[n, t, o] * inputs[n, t, i]) ** 2``, without ever holding
    the ``(samples, outs, ins)`` gradients. Deterministic on a machine; not differentiable.

    Everything accumulates in the dtype of ``scores``. For fp32 scores, products of 16-bit operands are exact and use
    16-bit instructions where the machine has them (AMX or AVX512-BF16 for bfloat16, tensor cores). The speed of AMX is
    not measured; ``ATEN_CPU_CAPABILITY=avx512`` does without it. Products of fp32 operands are fp32 on the CPU; on CUDA
    each is off by less than ``2**-15`` of itself (three products of bfloat16 parts; small shapes are multiplied by
    torch, in TF32 where its user allows that). float64 scores are computed in float64 throughout. With one
    token a sample, squares are taken first, and those of entries below 1e-19 underflow.

    Args:
        scores: ``(outs, ins)``, float32 or float64, contiguous.
        inputs: ``(samples, tokens, ins)``, the layer's inputs: float32, float64, bfloat16 or float16, of any strides.
        grad_outputs: ``(samples, tokens, outs)``, gradients of its outputs, in the dtype of ``inputs``, of any strides.
        precision: ``torch.bfloat16`` or ``torch.float16`` rounds both operands to it first, which is faster on tensor
            cores; float16 after scaling each by a power of two, so that its range holds them. None: as they are.

    Returns:
        ``scores``.

    Raises:
        TalosError: shapes, dtypes, layout or devices do not fit together.

    Example:
        >>> scores = accumulate_squared_per_sample_(torch.zeros(2, 3), torch.ones(1, 4, 3), torch.ones(1, 4, 2))
        >>> scores[0, 0].item()
        16.0
    """
    _check(scores, inputs, grad_outputs)
    scale = None
    if precision is not None:
        inputs, grad_outputs, scale = _rounded(inputs, grad_outputs, scores.dtype, precision)
    if scores.is_cuda and _is_small(inputs, grad_outputs):
        accumulate_squared_by_matmul(scores, inputs, grad_outputs, scale)
    else:
        torch.ops.talos_fast.accumulate_squared_per_sample_(scores, inputs, grad_outputs, scale)
    return scores


def accumulate_squared_per_sample_reference(
    scores: Tensor, inputs: Tensor, grad_outputs: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The operator in plain torch: one product a sample and block of rows, squared and multiplied by ``scale``."""
    _check(scores, inputs, grad_outputs, scale)
    inputs, grad_outputs = inputs.to(scores.dtype), grad_outputs.to(scores.dtype)
    rows = max(1, _BLOCK // max(1, scores.shape[1]))
    for begin in range(0, scores.shape[0], rows):
        block = scores[begin : begin + rows]
        product = torch.empty_like(block)
        for sample, grad in zip(inputs, grad_outputs[:, :, begin : begin + rows], strict=True):
            torch.mm(grad.t(), sample, out=product)
            block.addcmul_(product, product if scale is None else product * scale)
    return scores


def accumulate_squared_by_matmul(
    scores: Tensor, inputs: Tensor, grad_outputs: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The operator for tiny shapes, where a launch costs more than the sums: all products at once.

    With one token a sample it is one product of squares, ``(grad_outputs ** 2).T @ (inputs ** 2)``.
    """
    inputs, grad_outputs = inputs.to(scores.dtype), grad_outputs.to(scores.dtype)
    with torch.autocast(scores.device.type, enabled=False):
        if inputs.shape[1] == 1:
            squares = grad_outputs[:, 0].square().t() @ inputs[:, 0].square()
        else:
            squares = torch.bmm(grad_outputs.mT, inputs).square_().sum(0)
    return scores.add_(squares if scale is None else squares * scale)


def _is_small(inputs: Tensor, grad_outputs: Tensor) -> bool:
    return inputs.shape[1] == 1 or inputs.shape[0] * inputs.shape[2] * grad_outputs.shape[2] <= _SMALL


def _rounded(
    inputs: Tensor, grad_outputs: Tensor, dtype: torch.dtype, precision: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both operands in ``precision``, and what their squared products must be multiplied by."""
    if precision is torch.bfloat16:
        return inputs.to(precision), grad_outputs.to(precision), None
    if precision is not torch.float16:
        raise TalosError(f"precision must be torch.bfloat16, torch.float16 or None, but is {precision}")
    (x, up_x), (g, up_g) = _scaled_half(inputs), _scaled_half(grad_outputs)
    return x, g, torch.exp2(-2.0 * (up_x + up_g)).to(dtype)


def _scaled_half(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """``tensor * 2**up`` in float16, its largest entry in [2^14, 2^15), and ``up``, float64; without a host sync."""
    if tensor.numel() == 0:
        return tensor.half(), torch.zeros((), dtype=torch.float64, device=tensor.device)
    low, high = torch.aminmax(tensor.detach())
    exponent = torch.frexp(torch.maximum(low.abs(), high.abs()).double()).exponent
    up = (15 - exponent.double()).clamp(-126, 126)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (wide * torch.exp2(up).to(wide.dtype)).half(), up


def _check(scores: Tensor, inputs: Tensor, grad_outputs: Tensor, scale: Tensor | None = None) -> None:
    """Refuses what csrc/check.h refuses, with the library's own exception."""
    if scores.dim() != 2:
        raise TalosError(f"scores must be (outs, ins), but has shape {tuple(scores.shape)}")
    if inputs.dim() != 3:
        raise TalosError(f"inputs must be (samples, tokens, ins), but has shape {tuple(inputs.shape)}")
    if grad_outputs.dim() != 3:
        raise TalosError(f"grad_outputs must be (samples, tokens, outs), but has shape {tuple(grad_outputs.shape)}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TalosError(f"scores must be float32 or float64 (16 bits underflow), but is {scores.dtype}")
    if not scores.is_contiguous():
        raise TalosError(f"scores must be contiguous, but has strides {scores.stride()}; pass scores.contiguous()")
    if inputs.dtype not in _INPUT_DTYPES:
        raise TalosError(f"inputs must be float32, float64, bfloat16 or float16, but is {inputs.dtype}")
    if inputs.dtype != grad_outputs.dtype:
        raise TalosError(f"inputs is {inputs.dtype} but grad_outputs is {grad_outputs.dtype}; cast one to the other's")
    devices = [scores.device, inputs.device, grad_outputs.device]
    if len(set(devices)) > 1:
        raise TalosError(f"scores, inputs and grad_outputs must be on one device, but are on {devices}")
    expected = [(*inputs.shape[:2], scores.shape[0]), (*inputs.shape[:2], scores.shape[1])]
    if [tuple(grad_outputs.shape), tuple(inputs.shape)] != expected:
        raise TalosError(
            f"scores {tuple(scores.shape)}, inputs {tuple(inputs.shape)} and grad_outputs {tuple(grad_outputs.shape)} "
            "do not fit: they must be (outs, ins), (samples, tokens, ins) and (samples, tokens, outs)"
        )
    if scale is not None and (scale.numel(), scale.dtype, scale.device) != (1, scores.dtype, scores.device):
        raise TalosError(
            f"scale must be one number of {scores.dtype} on {scores.device} as scores is, but has shape "
            f"{tuple(scale.shape)}, {scale.dtype}, on {scale.device}"
        )


def _accumulate_in_torch(scores: Tensor, inputs: Tensor, grad_outputs: Tensor, scale: Tensor | None = None) -> None:
    ops.announce_fallback(scores.device.type)
    accumulate_squared_per_sample_reference(scores, inputs, grad_outputs, scale)


ops.register(_SCHEMA, _accumulate_in_torch, _check)
