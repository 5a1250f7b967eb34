"""`SelectedRows`: of a linear layer's weight gradient, only the rows that hold a selected entry are computed.

A fused query-key-value weight whose mask leaves V alone pays for two thirds of the product. What is saved for the
backward pass stays the same, since the gradient of the inputs needs every row. A linear map is recognised by its
weight, whichever module calls `F.linear`: nn.Linear, timm's and transformers' attention, and the projections inside
`F.multi_head_attention_forward`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from talos_fast.errors import TalosError
from talos_fast.optim.compact_operator import gather_selected
from talos_fast.optim.compaction import Compaction
from talos_fast.optim.selection import Selection, select
from talos_fast.takeover import Takeover

# Rows of a block that may be computed for nothing, of all: a block is a view, scattered rows are a copy.
_SLACK = 1 / 16


@dataclass(frozen=True)
class Rows:
    """Which rows of a weight (outs, ins), or entries of a bias (outs,), have a gradient.

    Args:
        start, stop: the block from the first to the last of them.
        index: the rows, int64, if they are scattered; None if the whole block is computed.
        selection: the selected entries, counted within these rows.
    """

    start: int
    stop: int
    index: Tensor | None
    selection: Selection

    @property
    def count(self) -> int:
        """How many rows are computed."""
        return self.stop - self.start if self.index is None else len(self.index)

    def of(self, columns: Tensor) -> Tensor:
        """The columns of ``(N, outs)`` that belong to the rows, (N, rows)."""
        return columns[:, self.start : self.stop] if self.index is None else columns.index_select(1, self.index)

    def gradient(self, part: Tensor, outs: int, dtype: torch.dtype, compact: bool) -> Tensor:
        """The whole gradient (outs, ...) from that of the rows, or only its selected entries, (entries,)."""
        if compact:
            return gather_selected(part, self.selection)
        whole = torch.zeros(outs, *part.shape[1:], dtype=dtype, device=part.device)
        if self.index is not None:
            return whole.index_copy_(0, self.index, part.to(dtype))
        whole[self.start : self.stop] = part
        return whole


def select_rows(parameter: Tensor, selection: Selection) -> Rows:
    """The rows of a contiguous parameter that hold a selected entry."""
    flags = torch.from_numpy(selection.flags()).view(parameter.shape)
    index = flags.view(len(flags), -1).any(1).nonzero()[:, 0]
    if not len(index):
        return Rows(0, 0, None, selection)
    start, stop = int(index[0]), int(index[-1]) + 1
    scattered = stop - start - len(index) > _SLACK * (stop - start)
    if scattered or start > 0:
        inside = flags[index] if scattered else flags[start:stop]
        selection = select(inside, parameter.new_empty(inside.shape))
    return Rows(start, stop, index.to(parameter.device) if scattered else None, selection)


class SelectedRows(Takeover):
    """Within it, linear maps compute the weight and bias gradients of rows with selected entries only.

    The others are zero, or absent once gradients are compacted. Values are those of plain autograd, under autocast too.
    Enter it around forward and backward: gradient checkpointing runs the forward again inside the backward, and raises
    if only one of the two is inside. Not reduced: slices of a packed weight (cross-attention splits it), weights that
    are not 2-D and contiguous, and any other use of a weight, whose gradient is added.

    Args:
        selections: the masked parameters.
        compaction: while it is active, its carriers take the selected entries in the parameters' place.
    """

    functions = (F.linear,)

    def __init__(self, selections: Mapping[Tensor, Selection], compaction: Compaction | None) -> None:
        super().__init__()
        self.attach(selections, compaction)

    def attach(self, selections: Mapping[Tensor, Selection], compaction: Compaction | None) -> None:
        """Takes other masks, or another compaction."""
        self._compaction = compaction
        self._rows = {
            p: select_rows(p, selection)
            for p, selection in selections.items()
            if p.dim() in (1, 2) and p.is_contiguous() and selection.in_c_order and p.numel()
        }

    def _carrier(self, p: Tensor) -> Tensor | None:
        return self._compaction.carriers.get(p) if self._compaction is not None and self._compaction.active else None

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """F.linear, on selected rows."""
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not (weight in self._rows and weight.dim() == 2 and weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(input, weight, bias)
        rows, weight_leaf = self._rows[weight], self._carrier(weight)
        if (bias is not None and bias.shape != weight.shape[:1]) or _is_watched(weight):
            return F.linear(input, weight, bias)
        if rows.stop == 0 and not _is_distributed():
            return F.linear(input, weight.detach(), bias)
        if weight_leaf is None and rows.count == len(weight):
            return F.linear(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type) and torch.float64 not in (input.dtype, weight.dtype):
            # As F.linear would; its cache of cast weights must not see one without a graph.
            input = input.to(torch.get_autocast_dtype(input.device.type))
        elif input.dtype != weight.dtype:
            return F.linear(input, weight, bias)  # torch says what is wrong
        bias_rows = None if bias is None or not bias.requires_grad else self._rows.get(bias)
        bias_leaf = None
        if bias is not None and bias_rows is not None:
            bias_leaf = self._carrier(bias)
            if bias_leaf is not None or bias_rows.stop == 0:
                bias = bias.detach()
        if weight_leaf is not None:
            if _is_distributed():
                raise TalosError(
                    "compacted gradients on selected rows, but not under DistributedDataParallel: "
                    "it waits for whole gradients; do without compact_gradients"
                )
            weight = weight.detach()
        output: Tensor = _RowsLinear.apply(input, weight, bias, weight_leaf, bias_leaf, rows, bias_rows)
        return output.view(*input.shape[:-1], len(weight))  # not in the Function: its view could not be written to


def _is_distributed() -> bool:
    """Whether DistributedDataParallel waits for a gradient, of zeros too, of whatever requires one."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def _is_watched(weight: Tensor) -> bool:
    """Whether a hook is to be shown the whole gradient, or a transform such as `torch.vmap` is at work; eager only."""
    eager = not torch.compiler.is_compiling()
    return eager and bool(weight._backward_hooks or torch._C._are_functorch_transforms_active())


class _RowsLinear(torch.autograd.Function):
    """``F.linear`` whose weight gradient is ``grad[:, rows]ᵀ input``; leaves take its selected entries, if given."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, weight_leaf: Tensor | None,
        bias_leaf: Tensor | None, rows: Rows, bias_rows: Rows | None,
    ) -> Tensor:  # fmt: skip
        cast = weight.to(input.dtype)
        # Flat: torch takes a slow batched product where the weight needs no gradient and the input is transposed.
        flat = input.reshape(-1, input.shape[-1])
        # A shape that F.linear never saves: if only one of a forward and its recomputation runs in this context, the
        # shapes that checkpointing compares differ, and it raises instead of silently mixing the two up.
        mark = flat.new_empty(0, 0, 0)
        ctx.save_for_backward(mark, flat, cast if ctx.needs_input_grad[0] else None)
        ctx.shape = input.shape
        ctx.rows, ctx.bias_rows = rows, bias_rows
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        # A bias that trains is cast here: autocast would cache its cast, which has no graph. A frozen one it may cache.
        return F.linear(flat, cast, bias.to(input.dtype) if bias is not None and bias.requires_grad else bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, inputs, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, of_weight_leaf, of_bias_leaf = ctx.needs_input_grad[:5]
        outs = grad.shape[-1]
        flat = grad.reshape(-1, outs)
        for_input = (flat @ weight).view(ctx.shape) if of_input else None
        for_weight = for_bias = None
        if of_weight or of_weight_leaf:
            product = ctx.rows.of(flat).t() @ inputs
            for_weight = ctx.rows.gradient(product, outs, ctx.dtypes[0], of_weight_leaf)
        if of_bias or of_bias_leaf:
            if ctx.bias_rows is None:
                for_bias = flat.sum(0)
            else:
                for_bias = ctx.bias_rows.gradient(ctx.bias_rows.of(flat).sum(0), outs, ctx.dtypes[1], of_bias_leaf)
        return (
            for_input, for_weight if of_weight else None, for_bias if of_bias else None,
            for_weight if of_weight_leaf else None, for_bias if of_bias_leaf else None, None, None,
        )  # fmt: skip
