"""Which rows of an activation belong to which sample: read off gradients, never guessed from sizes.

The batch axis of a use may be any dimension, or a factor of a merged one: (N, T, F), (T, N, F), (N·T, F), (T·N, F). So
each sample's scalar is multiplied by a code of its own, a signed power of two, and propagated back once more. Samples
do not interact, so a row of an output's gradient is multiplied by the code of the sample that it belongs to, without
any rounding, whatever views, permutations or kernels lie between. An axis is right if it predicts the factor of every
row. Axes that nothing distinguishes (rows without gradient) are looked at again in the next batch.

Only subnormal numbers are rounded by a code, and in fp16 up to nine tenths of ViT-tiny's gradients are subnormal: rows
were 8 % off. So in fp16 both gradients are scaled up before they are compared. The roundings that remain grow from
layer to layer, to 2 % of a row, which is about fp16's own error; `HALF` allows for them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PROJECTIONS = 8
# What fp16 gradients are first multiplied by, and by which factor less if they overflow.
SCALE, STEP = 2.0**12, 2.0**4


class Limits(NamedTuple):
    """How far row values may differ: ``tolerance``, of the row's norm, and ``floor``.

    The tolerance is far above the rounding of kernels that add in varying order. The sum of a row with random signs
    falls below it by chance in 1 % of rows (5 % in fp16), all of several such sums never do, so codes that differ by a
    factor of 2 or by a sign are told apart. Gradients that a code may push below the range of the dtype decide nothing.
    """

    tolerance: float
    floor: float


WIDE = Limits(1e-2, 1e-30)
HALF = Limits(6e-2, 4e-6)


@dataclass(frozen=True)
class Axis:
    """Where the samples are: dimension ``dim`` counts (N, r) rows if ``major``, (r, N) if not."""

    dim: int
    major: bool

    def tokens(self, tensor: Tensor, samples: int, features: int = 1) -> Tensor:
        """(N, T, *features) of a tensor (*rows, *features); a view where strides allow it."""
        rows, shape = tensor.shape[: tensor.dim() - features], tensor.shape[tensor.dim() - features :]
        count = prod(rows) // samples  # not -1, which is ambiguous where there are no features
        if samples == 1:
            return tensor.reshape(1, count, *shape)
        split = (samples, -1) if self.major else (-1, samples)
        apart = tensor.unflatten(self.dim, split).movedim(self.dim + (not self.major), 0)
        tokens: Tensor = apart.reshape(samples, count, *shape)
        return tokens

    def owners(self, rows: Sequence[int], samples: int, device: torch.device) -> Tensor:
        """The sample of every row, broadcastable to ``rows``."""
        size = rows[self.dim]
        index = torch.arange(size, device=device)
        owner = index // (size // samples) if self.major else index % samples
        return owner.view([-1 if dim == self.dim else 1 for dim in range(len(rows))])


def candidates(rows: Sequence[int], samples: int) -> Iterator[Axis]:
    """Every axis that has room for ``samples``, the usual one (samples first) first."""
    for dim, size in enumerate(rows):
        if size and size % samples == 0:
            yield Axis(dim, True)
            if size != samples:
                yield Axis(dim, False)


def pattern(rows: Sequence[int], samples: int) -> tuple[tuple[bool, bool], ...]:
    """What of the sizes decides which axes are possible; a use with a new pattern is looked at anew."""
    return tuple((size % samples == 0, size == samples) for size in rows)


def codes(samples: int, generator: torch.Generator) -> Tensor:
    """±1/64 … ±1, (N,): distinct up to 14 samples, then drawn. None makes a gradient larger, so none overflows."""
    book = torch.tensor(
        [sign * 2.0**-power for power in range(7) for sign in (1, -1)], dtype=torch.float32, device="cpu"
    )
    order = torch.randperm(len(book), generator=generator, device="cpu")
    drawn = torch.randint(len(book), (max(0, samples - len(book)),), generator=generator, device="cpu")
    return book[torch.cat([order, drawn])[:samples]]


def row_values(gradient: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """A few numbers a row, linear in the row (sums with fixed random signs), and its norm: (*rows, P) and (*rows)."""
    flat = gradient.unsqueeze(-1) if features == 0 else gradient.flatten(gradient.dim() - features)
    wide = flat if flat.dtype is torch.float64 else flat.float()
    generator = torch.Generator().manual_seed(flat.shape[-1])
    signs = torch.randint(0, 2, (flat.shape[-1], PROJECTIONS), generator=generator, device="cpu") * 2 - 1
    return wide @ signs.to(wide.device, wide.dtype), torch.linalg.vector_norm(wide, dim=-1)


def consistent(
    coded: Tensor, plain: Tensor, scale: Tensor, code: Tensor, limits: Limits = WIDE
) -> tuple[list[Axis], bool]:
    """The axes by which ``coded`` is ``plain`` times the code of each row's sample, and whether any row says so.

    Args:
        coded: row values (*rows, P) of the gradient with codes.
        plain: row values without.
        scale: row norms (*rows) without.
        code: (N,).
        limits: for the dtype of the gradient.
    """
    samples, rows = len(code), scale.shape
    said = (scale * code.abs().min().item() > limits.floor).any()
    possible = list(candidates(rows, samples))
    if not possible:
        return [], bool(said)
    code = code.to(plain.device, plain.dtype)
    verdicts = [said]
    for axis in possible:
        factor = code[axis.owners(rows, samples, plain.device)]
        allowed = limits.tolerance * factor.abs() * scale + limits.floor
        verdicts.append(((coded - factor[..., None] * plain).abs() <= allowed[..., None]).all())
    says, *right = torch.stack(verdicts).tolist()
    return [axis for axis, fits in zip(possible, right, strict=True) if fits], says
