"""Which parameters of an optimizer the Triton kernels step, in which launches, and when those are built anew."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim import launch
from talos_fast.optim.launch import Launch
from talos_fast.optim.selection import Selection
from talos_fast.optim.state import MOMENTS, Group, Member, State

Gradients = Sequence[Tensor | None]
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupLaunches:
    """The launches of one parameter group: one for each device and dtypes of parameter, gradient and state.

    ``others`` are the places, in the group, of parameters with a state that the kernels do not reach.
    """

    def __init__(self, group: Group, gradients: Gradients, members: Sequence[Member]) -> None:
        self._group, self._amsgrad = group, group["amsgrad"]
        self._members = members
        self.others: list[int] = []
        self._waiting: list[int] = []
        parts: dict[Any, list[int]] = defaultdict(list)
        for place, (member, gradient) in enumerate(zip(members, gradients, strict=True)):
            p, selection, state = member
            dtype = p.dtype if gradient is None else gradient.dtype
            if selection is not None and selection.count == 0:
                continue
            if not state:
                self._waiting.append(place)
            elif not _is_reached(member, dtype, self._amsgrad):
                self.others.append(place)
            else:
                state["step"] = state["step"].to(p.device, torch.float32)
                parts[p.device, p.dtype, dtype, state["exp_avg"].dtype].append(place)
        self._launches = [(places, Launch([members[n] for n in places], key[2])) for key, places in parts.items()]

    @property
    def captured(self) -> bool:
        """Whether a graph reads these tables."""
        return any(one.captured for _, one in self._launches)

    def fit(self, gradients: Gradients) -> bool:
        """Whether they can step these gradients of the group as it is now."""
        parameters = self._group["params"]
        return (
            len(parameters) == len(self._members)
            and all(map(is_, parameters, (member.parameter for member in self._members)))
            and self._amsgrad == self._group["amsgrad"]
            and all(gradients[place] is None for place in self._waiting)
            and all(_is_of(gradients[n], one.gradient_dtype) for places, one in self._launches for n in places)
        )

    def run(self, gradients: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of every parameter of the group but the others."""
        if launch.is_capturing():
            self._require_all(gradients)
        for places, one in self._launches:
            one.run([gradients[place] for place in places], self._group, grad_scale, found_inf)

    def _require_all(self, gradients: Gradients) -> None:
        """A graph steps the same parameters at each replay, so all of them must take part."""
        names = self._group.get("param_names", range(len(gradients)))
        for name, member, gradient in zip(names, self._members, gradients, strict=True):
            p, selection, _ = member
            if gradient is None and p.requires_grad and (selection is None or selection.count):
                raise TalosError(
                    f"MaskedAdam: parameter {name} of shape {tuple(p.shape)} has no gradient, and a graph captured "
                    "now would never step it; run a backward pass first, or freeze it (requires_grad=False)"
                )


class Launches:
    """An optimizer's `GroupLaunches`, kept while the tensors they point to stay where they are."""

    def __init__(self) -> None:
        self._groups: dict[int, GroupLaunches] = {}
        self._addresses: list[int] = []
        self._kept: list[GroupLaunches] = []

    def get(self, group: Group, gradients: Gradients) -> GroupLaunches | None:
        """The launches of the group, if there are any and they still fit."""
        found = self._groups.get(id(group))  # they hold the group, so nothing else can have its id
        return found if found is not None and _wants(group) and found.fit(gradients) else None

    def build(
        self, group: Group, gradients: Gradients, selections: Mapping[Tensor, Selection], states: Mapping[Tensor, State]
    ) -> GroupLaunches | None:
        """Launches of the group; None if no tensor of it is on a device that they reach.

        Raises:
            TalosError: a graph is being captured; it would read tables that are not there yet.
        """
        self._drop(id(group))
        parameters = group["params"]
        if not (_wants(group) and any(launch.reaches(device) for device in {p.device for p in parameters})):
            return None
        if launch.is_capturing():
            raise TalosError("MaskedAdam: take an eager step before each capture; it prepares what the graph will read")
        members = [Member(p, selections.get(p), states.get(p, {})) for p in parameters]
        self._groups[id(group)] = GroupLaunches(group, gradients, members)
        self._addresses.clear()
        return self._groups[id(group)]

    def check(self, groups: Sequence[Group], states: Mapping[Tensor, State]) -> bool:
        """Before a step: drops what points to tensors that have moved, or to a state that was replaced.

        Returns whether there are launches left.
        """
        if self._groups and _addresses(groups, states) != self._addresses:
            self.clear()
        return bool(self._groups)

    def settle(self, groups: Sequence[Group], states: Mapping[Tensor, State]) -> None:
        """After a step: notes where the tensors lie, if launches were built."""
        if self._groups and not self._addresses:
            self._addresses = _addresses(groups, states)

    def clear(self) -> None:
        """Drops all launches."""
        for key in list(self._groups):
            self._drop(key)
        self._addresses.clear()

    def _drop(self, key: int) -> None:
        dropped = self._groups.pop(key, None)
        if dropped is not None and dropped.captured:
            self._kept.append(dropped)  # a graph reads its tables at every replay


def _wants(group: Group) -> bool:
    return not (group["fused"] is False or group["foreach"])


def _is_of(gradient: Tensor | None, dtype: torch.dtype) -> bool:
    return gradient is None or (gradient.dtype is dtype and gradient.layout is torch.strided)


def _addresses(groups: Sequence[Group], states: Mapping[Tensor, State]) -> list[int]:
    parameters = chain.from_iterable(group["params"] for group in groups)
    in_states = chain.from_iterable(state.values() for state in states.values())
    return [tensor.data_ptr() if type(tensor) in _PLAIN else id(tensor) for tensor in chain(parameters, in_states)]


def _is_reached(member: Member, gradient_dtype: torch.dtype, amsgrad: bool) -> bool:
    """Whether the kernels can step the member: plain tensors, dense in memory, of the dtypes they know."""
    p, selection, state = member
    moments = [state.get(name) for name in MOMENTS[: 3 if amsgrad else 2]]
    order = member.order if selection is None else (0,)
    return (
        type(p) in _PLAIN
        and launch.reaches(p.device)
        and p.permute(member.order).is_contiguous()
        and {p.dtype, gradient_dtype} <= set(_DTYPES)
        and all(m is not None and m.device == p.device and m.permute(order).is_contiguous() for m in moments)
        and len({m.dtype for m in moments if m is not None}) == 1
        and ("master" in state) == (selection is not None and p.dtype is not torch.float32)
    )
