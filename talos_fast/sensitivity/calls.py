"""Hooked outputs, and what is remembered of them from batch to batch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from talos_fast.sensitivity.alias import Alias
from talos_fast.sensitivity.axis import SCALE, Axis
from talos_fast.sensitivity.registry import Make

Site = tuple[str, tuple[str, ...], int]
"""A place in the program: the function, the parameters in it, and how many times they were seen before."""


@dataclass
class Findings:
    """What is known about a model's uses, from batch to batch.

    Args:
        uncovered: name -> why its scores cannot come from capture.
        shared: sites whose rows do not belong to samples, so that they are functions of the parameter alone.
        axes: `Call.key` -> where the samples are; None where no gradient arrives.
        changing: whether rows may belong to other samples in every batch, so that each is looked at.
        scale: what fp16 gradients are multiplied by while axes are sought.
    """

    uncovered: dict[str, str] = field(default_factory=dict)
    shared: set[Site] = field(default_factory=set)
    axes: dict[Any, Axis | None] = field(default_factory=dict)
    changing: bool = False
    scale: float = SCALE


@dataclass
class Call:
    """One hooked output.

    Args:
        site: where in the program.
        aliases, makes: whose uses its gradient gives, and the formula of each.
        view: brings the gradient into the order (*rows, *features).
        features: how many trailing dimensions of that are features.
        key: site, number of the output there, and the pattern of its rows: outputs of one key have one axis.
        inputs: what the formulas read, each with its version when it was called.
        aliasing: whether it is a function of one parameter alone.
        reached: whether a gradient has come.
        seen: values and norms of the gradient's rows, without codes and with them.
    """

    site: Site
    aliases: list[Alias]
    makes: list[Make]
    view: Callable[[Tensor], Tensor]
    features: int
    key: Any
    inputs: list[tuple[Tensor, int]]
    aliasing: bool
    reached: bool = False
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def release(self) -> None:
        """Frees what the formulas hold, such as the layer's input."""
        self.makes, self.inputs, self.seen = [], [], []


def tapped(anchor: Tensor, output: Tensor, aliases: Iterable[Alias], receive: Callable[[Tensor], None]) -> Tensor:
    """``output``, which has no graph, as a tensor whose gradient goes to ``receive``.

    To autograd it is no view, so functions such as ``relu(inplace=True)`` may write to it, unless it is a copy of a
    parameter (see `Capture.expand`).
    """
    memory = output.untyped_storage().data_ptr()
    if all(alias.parameter.untyped_storage().data_ptr() != memory for alias in aliases):
        output = torch.ops.aten._unsafe_view(output, output.shape)
    return _Tap.apply(anchor, output, receive)  # type: ignore[no-any-return]


class _Tap(torch.autograd.Function):
    """The identity on a tensor without a graph; its backward hands the gradient over and stops."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """``tensor``; ``anchor`` requires a gradient, so the result does."""
        ctx.receive = receive
        if tensor._is_view():
            return tensor.view_as(tensor)
        ctx.mark_dirty(tensor)  # an output that is a view could not be modified in place, as by ReLU(inplace=True)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """Calls ``receive`` with the gradient."""
        ctx.receive(gradient)
        return None, None, None
