"""The two launches of a Triton step, and what the host does around them.

The tables are built once for a set of tensors that step together. From one step to the next only the gradients move:
their addresses travel in one asynchronous copy, and not even that where they are those of the step before.
"""

from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from talos_fast import ops
from talos_fast.errors import TalosError
from talos_fast.optim.selection import BLOCK
from talos_fast.optim.state import Member
from talos_fast.optim.tables import addresses, block_rows, in_memory_order, word_ranks

_TENSORS = 128  # that one program of `advance` takes
ON_CPU = False
"""Whether CPU tensors step here too: for tests, which run the kernels in Triton's interpreter."""


def reaches(device: torch.device) -> bool:
    """Whether parameters on ``device`` can step here; where only Triton is missing, the log says so once."""
    return (device.type == "cuda" or (ON_CPU and device.type == "cpu")) and _kernels() is not None


def _kernels() -> Any:
    return ops.triton_kernels("masked_adam", "MaskedAdam steps")


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Launch:
    """Tensors that step together: those of one group and device, with one dtype of parameter, gradient and state.

    Args:
        members: parameters that are plain and dense in memory, each with its state; ``step`` is a float32 tensor on
            their device, the moments lie in the memory order of the parameter or are compact.
        gradient_dtype: that of their gradients.
    """

    def __init__(self, members: Sequence[Member], gradient_dtype: torch.dtype) -> None:
        first = members[0]
        self.members, self.gradient_dtype, self.device = members, gradient_dtype, first.parameter.device
        dtypes = first.parameter.dtype, gradient_dtype, first.state["exp_avg"].dtype
        self._types = [getattr(_kernels().tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]
        self._has_master = "master" in first.state
        indices = [None if m.selection is None else m.selection.index for m in members]
        self._indices = [None if index is None else index.to(self.device) for index in indices]
        self._ranks = [None if i is None or i.dtype is not torch.uint8 else word_ranks(i) for i in self._indices]
        self._rows = torch.cat([block_rows(n, m).to(self.device) for n, m in enumerate(members)])
        table = [addresses(*row) for row in zip(members, self._indices, self._ranks, strict=True)]
        self._table = torch.tensor(table).to(self.device)
        self._scalars = torch.empty(len(members), _kernels().SCALARS.value, dtype=torch.float32, device=self.device)
        self._gradients = torch.zeros(len(members), 2, dtype=torch.int64, device=self.device)
        self._known: list[int] = []
        self._numels = [m.parameter.numel() for m in members]
        self._plain = all(m.order == tuple(range(m.parameter.dim())) for m in members)
        self._pins = self.device.type == "cuda"
        self._spare: Tensor | None = self._pinned_row()
        self.captured: list[Tensor] = []

    def run(
        self, gradients: Sequence[Tensor | None], group: Mapping[str, Any], grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        """One step.

        Args:
            gradients: of the members, in order; of the parameter's shape, or compact, (k,); None where there is none.
            group: the hyperparameters. A tensor lr or beta on a device is read there.
            grad_scale: 0-d, what the gradients are divided by.
            found_inf: 0-d; if it is not 0, nothing changes.
        """
        if not (self._plain and all(g is None or g.is_contiguous() for g in gradients)):
            pairs = zip(gradients, self.members, strict=True)
            gradients = [None if g is None else in_memory_order(g, member) for g, member in pairs]
        grad_scale = None if grad_scale is None else grad_scale.to(self.device, torch.float32)
        found_inf = None if found_inf is None else found_inf.to(self.device)
        with self._guard():
            table = self._upload(gradients)
            self._advance(table, group, found_inf)
            self._update(table, group, grad_scale, found_inf)
        stepped = [m.parameter for m, g in zip(self.members, gradients, strict=True) if g is not None]
        torch.autograd.graph.increment_version(stepped)  # a kernel writes behind autograd's back

    def _guard(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever the tensors are on."""
        elsewhere = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        return torch.cuda.device(self.device) if elsewhere else nullcontext()

    def _upload(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The addresses of the gradients on the device: (members, 2) int64."""
        content = [
            number
            for g, numel in zip(gradients, self._numels, strict=True)
            for number in ((0, 0) if g is None else (g.data_ptr(), g.numel() != numel))
        ]
        if is_capturing():
            return self._capture(content)
        if content != self._known:
            # Each copy has a row of its own: the allocator hands it out again only when the copy is done.
            row = torch.frombuffer(array("q", content), dtype=torch.int64)
            self._gradients.view(-1).copy_(row.pin_memory() if self._pins else row, non_blocking=True)
            self._known = content
        if self._spare is None:
            self._spare = self._pinned_row()
        return self._gradients

    def _capture(self, content: list[int]) -> Tensor:
        """A table of the graph's own, which each replay fills from a pinned row that nobody writes again."""
        if self._spare is None:
            raise TalosError("MaskedAdam: take an eager step before each capture; it prepares what the graph will read")
        row, self._spare = self._spare, None
        row.numpy()[:] = content
        self.captured.append(row)
        return torch.empty_like(self._gradients).copy_(row.view(-1, 2), non_blocking=True)

    def _pinned_row(self) -> Tensor:
        return torch.zeros(2 * len(self.members), dtype=torch.int64, device="cpu", pin_memory=self._pins)

    def _advance(self, gradients: Tensor, group: Mapping[str, Any], found_inf: Tensor | None) -> None:
        # Triton takes a pointer for every argument; `unread` stands for those that this launch does not read.
        lr, (beta1, beta2) = group["lr"], group["betas"]
        lr_tensor, betas_tensor = (isinstance(v, Tensor) and v.device.type == self.device.type for v in (lr, beta1))
        unread = self._scalars
        _kernels().advance[(-(-len(self.members) // _TENSORS),)](
            self._table, gradients, self._scalars, unread if found_inf is None else found_inf,
            lr.to(self.device) if lr_tensor else unread,
            beta1.to(self.device) if betas_tensor else unread, beta2.to(self.device) if betas_tensor else unread,
            len(self.members), 0.0 if lr_tensor else float(lr),
            0.0 if betas_tensor else float(beta1), 0.0 if betas_tensor else float(beta2),
            float(group["weight_decay"]), float(group["eps"]), -1.0 if group["maximize"] else 1.0,
            LR_ON_DEVICE=lr_tensor, BETAS_ON_DEVICE=betas_tensor, MAY_SKIP=found_inf is not None,
            TENSORS=_TENSORS, num_warps=_TENSORS // 32,
        )  # fmt: skip

    def _update(
        self, gradients: Tensor, group: Mapping[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        unread = self._scalars
        parameter, gradient, state = self._types
        _kernels().update[(len(self._rows),)](
            self._rows, self._table, gradients, self._scalars,
            unread if grad_scale is None else grad_scale, unread if found_inf is None else found_inf,
            TYPE=parameter, GRADIENT=gradient, STATE=state, HAS_MASTER=self._has_master, AMSGRAD=group["amsgrad"],
            HAS_GRAD_SCALE=grad_scale is not None, MAY_SKIP=found_inf is not None, BLOCK=BLOCK,
            num_warps=_kernels().WARPS, enable_fp_fusion=True,
        )  # fmt: skip
