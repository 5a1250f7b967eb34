"""CUDA graphs, and an emulation of them on the CPU: what one keeps of a captured step, and what a replay then does.

A graph holds kernels with the addresses and numbers they were launched with, and nothing of what the host did between
them. So `EmulatedGraph.capture` runs Python once and no kernel that writes to memory which was there before; `replay`
runs all of them, on the same tensors. What a step needs anew each time but decides on the host shows as a wrong result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
SYNCS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.is_nonzero, _aten.equal, _aten.item}
"""Operators that make the host wait for a device."""
_NO_KERNEL = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class EmulatedGraph:
    """Operators that reach the dispatcher, and launches of Triton kernels, in their order."""

    def __init__(self) -> None:
        self._work: list[Callable[[], object]] = []

    def capture(self, step: Callable[[], None], monkeypatch: Any) -> None:
        """Takes down one step. What it makes anew stays alive with the graph, as in a graph's own pool."""
        from talos_fast.kernels import masked_adam

        with monkeypatch.context() as patch, _Recorder(self._work):
            for asked in ("torch.cuda.is_current_stream_capturing", "talos_fast.optim.launch.is_capturing"):
                patch.setattr(asked, lambda: True)
            for name in ("advance", "update"):
                patch.setattr(masked_adam, name, _Kernel(getattr(masked_adam, name), self._work))
            step()

    def replay(self) -> None:
        """The step again, with what its tensors hold now."""
        with torch._C._AutoDispatchBelowAutograd():
            for work in self._work:
                work()


class _Recorder(TorchDispatchMode):
    """Hands views on, notes what writes in place without running it, and runs and notes the rest."""

    def __init__(self, work: list[Callable[[], object]]) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operator, schema = kwargs or {}, func.overloadpacket, func._schema
        assert operator not in SYNCS, f"{func} waits for the device, which a capture does not allow"
        if schema.is_mutable:
            self._work.append(partial(func, *args, **kwargs))
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            written = tuple(given[a.name] for a in schema.arguments if a.is_write)[: len(schema.returns)]
            return written if len(schema.returns) > 1 else next(iter(written), None)
        made = func(*args, **kwargs)
        if operator not in _NO_KERNEL and not any(r.alias_info for r in schema.returns):
            self._work.append(partial(_again, func, args, kwargs, made))
        return made


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
    """Into the memory that its results had at the capture."""
    for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and not old._is_zerotensor():  # those have no memory
            old.copy_(new)


class _Kernel:
    """A Triton kernel whose launches are noted."""

    def __init__(self, kernel: Any, work: list[Callable[[], object]]) -> None:
        self._kernel, self._work = kernel, work

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._work.append(partial(self._kernel[grid], *args, **kwargs))


class Graphs:
    """What captures a step: CUDA or, of kind "emulated", the emulation; ``device`` is where the step's tensors lie."""

    def __init__(self, kind: str, monkeypatch: Any) -> None:
        self.device, self._monkeypatch = "cuda" if kind == "cuda" else "cpu", monkeypatch

    def capture(self, step: Callable[[], None], warmup: int = 1) -> Any:
        """A graph of a step. It follows eager ones, on a side stream as torch advises, and is not taken itself."""
        if self.device == "cpu":
            for _ in range(warmup):
                step()
            emulated = EmulatedGraph()
            emulated.capture(step, self._monkeypatch)
            return emulated
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph
