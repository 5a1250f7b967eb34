"""Uses of a parameter as per-sample gradients, and the sum of squares over samples of all its uses together.

A parameter may be used several times in one forward (tied weights, shared layers): its gradient is the sum over the
uses, so they are joined within each sample before squaring: (Σ_uses g)², not Σ_uses g².
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from talos_fast.sensitivity.accumulate import accumulate_squared_per_sample_

Precision = Literal["full", "bf16"]


@dataclass(frozen=True)
class Outer:
    """A use of a matrix (O, I): sample n's gradient is Σ_t grads[n, t]ᵀ inputs[n, t].

    Args:
        inputs: (N, T, I).
        grads: (N, T, O).
        first: where the matrix starts among the parameter's entries in C order; it is O·I of them in a row.
    """

    inputs: Tensor
    grads: Tensor
    first: int = 0

    @property
    def block(self) -> tuple[int, int, int]:
        """(first, O, I)."""
        return self.first, self.grads.shape[2], self.inputs.shape[2]

    def add_to(self, gradient: Tensor, n: int) -> None:
        """Adds sample n's gradient to all entries of the parameter, flat."""
        first, outs, ins = self.block
        product = self.grads[n].to(gradient.dtype).t() @ self.inputs[n].to(gradient.dtype)
        gradient[first : first + outs * ins] += product.reshape(-1)


@dataclass(frozen=True)
class Lookup:
    """A use of a table (V, F): sample n's gradient is grads[n, t] at row ids[n, t], 0 elsewhere."""

    ids: Tensor
    grads: Tensor

    def add_to(self, gradient: Tensor, n: int) -> None:
        """As `Outer.add_to`."""
        width = self.grads.shape[2]
        gradient.view(-1, width).index_add_(0, self.ids[n], self.grads[n].to(gradient.dtype))


@dataclass(frozen=True)
class PerSample:
    """A use of a small parameter: its per-sample gradients (N, *shape)."""

    grads: Tensor

    def add_to(self, gradient: Tensor, n: int) -> None:
        """As `Outer.add_to`."""
        gradient += self.grads[n].reshape(-1).to(gradient.dtype)


Use = Outer | Lookup | PerSample


@dataclass(frozen=True)
class Accumulator:
    """Where squares of one parameter are summed.

    Args:
        values: fp32 or fp64, contiguous, on any device: like the parameter, or ``rows`` of it.
        shape: of the parameter.
        rows: ascending indices (int64, on the CPU) into its first dimension, of the rows that are wanted; None: all.
    """

    values: Tensor
    shape: torch.Size
    rows: Tensor | None = None

    @classmethod
    def zeros(
        cls, like: Tensor, dtype: torch.dtype, device: torch.device | None, rows: Tensor | None = None
    ) -> "Accumulator":
        """An empty sum for the parameter ``like``, on its device by default."""
        shape = like.shape if rows is None else (len(rows), *like.shape[1:])
        return cls(torch.zeros(shape, dtype=dtype, device=device or like.device), like.shape, rows)

    def wanted(self, tensor: Tensor) -> Tensor:
        """What of a tensor of the parameter's shape is summed here, on the device of the sum."""
        tensor = tensor.view(self.shape)
        chosen = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        return chosen.to(self.values.device)

    def add(self, squares: Tensor) -> None:
        """Adds a tensor of the parameter's shape."""
        self.values.add_(self.wanted(squares))

    def add_outer(self, use: Outer, precision: Precision) -> None:
        """Adds Σ_n (Σ_t grads ⊗ inputs)² with the fused operator, for the wanted rows only."""
        inputs, grads = use.inputs, use.grads
        first, count, ins = use.block
        if self.rows is not None:
            start = first // ins
            begin, end = torch.searchsorted(self.rows, torch.tensor([start, start + count], device="cpu")).tolist()
            if end - begin < count:
                count = end - begin
                # Filled up to a multiple of 8 with row 0, which is cut off again below: tokens then lie a multiple of
                # 16 bytes apart even in 16 bits, and CUDA copies them whole instead of entry by entry.
                chosen = F.pad(self.rows[begin:end] - start, (0, -count % 8))
                grads = grads[..., chosen.to(grads.device)]
            first = begin * ins
        target = self.values.view(-1)[first : first + count * ins].view(count, ins)
        if precision == "bf16":
            inputs, grads = inputs.bfloat16(), grads.bfloat16()
        grads = grads[..., :count]
        if target.device == grads.device:
            accumulate_squared_per_sample_(target, inputs.to(grads.dtype), grads)
        else:
            here = torch.zeros_like(target, device=grads.device)
            target.add_(accumulate_squared_per_sample_(here, inputs.to(grads.dtype), grads).to(target.device))


def add_squares(uses: Sequence[Use], into: Accumulator, precision: Precision) -> None:
    """Adds the squares of the per-sample sums of all ``uses`` of one parameter."""
    outers = [use for use in uses if isinstance(use, Outer)]
    if len(outers) == len(uses):
        joined = list(_joined(outers))
        if _apart(joined) and (into.rows is None or _whole_rows(joined, into.shape)):
            for outer in joined:
                into.add_outer(outer, precision)
            return
    small = [use.grads for use in uses if isinstance(use, PerSample)]
    if len(small) == len(uses):
        total = sum(small[1:], start=small[0].to(into.values.dtype))
        into.add(total.square().sum(0))
        return
    lookups = [use for use in uses if isinstance(use, Lookup)]
    whole = [use for use in _joined(outers) if use.block[1:] == tuple(into.shape)]
    if lookups and into.rows is None and len(whole) <= 1 and len(lookups) + len(outers) == len(uses):
        _add_table(lookups, whole, into, precision)
        return
    grads = uses[0].grads
    for n in range(len(grads)):
        gradient = torch.zeros(prod(into.shape), dtype=into.values.dtype, device=grads.device)
        for use in uses:
            use.add_to(gradient, n)
        into.add(gradient.square_())


def _joined(outers: Sequence[Outer]) -> Iterator[Outer]:
    """One use a block: several (N, T_i, F) along the tokens, since one sum over t of products is the sum over all."""
    blocks: dict[tuple[int, int, int], list[Outer]] = {}
    for use in outers:
        blocks.setdefault(use.block, []).append(use)
    for (first, _, _), same in blocks.items():
        if len(same) == 1:
            yield same[0]
        else:
            yield Outer(torch.cat([u.inputs for u in same], 1), torch.cat([u.grads for u in same], 1), first)


def _apart(uses: Sequence[Outer]) -> bool:
    """Whether no entry is in two blocks."""
    spans = sorted((first, first + outs * ins) for first, outs, ins in (use.block for use in uses))
    return all(before[1] <= after[0] for before, after in pairwise(spans))


def _whole_rows(uses: Sequence[Outer], shape: torch.Size) -> bool:
    length = prod(shape[1:])
    return all(ins == length and first % length == 0 for first, _, ins in (use.block for use in uses))


def _add_table(lookups: Sequence[Lookup], whole: Sequence[Outer], into: Accumulator, precision: Precision) -> None:
    """A table that is looked up, A, and maybe multiplied by as well (tied embeddings), B: (A + B)² = B² + A(A + 2B).

    A has few rows, one a token, so B² comes from the fused operator and the rest from these rows alone.
    """
    for use in whole:
        into.add_outer(use, precision)
    ids, grads = torch.cat([use.ids for use in lookups], 1), torch.cat([use.grads for use in lookups], 1)
    wide = into.values.dtype
    for n, (tokens, places) in enumerate(torch.unique(row, return_inverse=True) for row in ids):
        rows = torch.zeros(len(tokens), grads.shape[2], dtype=wide, device=grads.device)
        rows.index_add_(0, places, grads[n].to(wide))
        extra = rows.square()
        for use in whole:
            extra.addcmul_(rows, use.grads[n, :, tokens].to(wide).t() @ use.inputs[n].to(wide), value=2)
        into.values.index_add_(0, tokens.to(into.values.device), extra.to(into.values.device))


def transposed(use: Outer) -> Outer:
    """The same use, of the transposed matrix."""
    return replace(use, inputs=use.grads, grads=use.inputs)
