"""`MaskedAdam`: AdamW over the selected entries only, a drop-in for `torch.optim.AdamW`.

Every selected entry moves as under AdamW; the others are never written, weight decay included; and the state of a
parameter with k selected entries is k entries a moment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.optim.gradients import MaskedGradients
from talos_fast.optim.masks import Masks, check_mask, masks_by_parameter, pack
from talos_fast.optim.plan import select
from talos_fast.optim.stepping import MOMENTS, compiles, start, step_compiled, step_reference


class MaskedAdam(MaskedGradients):
    """AdamW that moves, decays and keeps state for the selected entries only.

    Positional order, defaults and error texts are AdamW's; without ``masks`` it is AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; a group may carry its own ``masks``.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in `torch.optim.AdamW`.
        fused, foreach: by default masked parameters on the CPU are stepped by a C++ operator, in one pass over what is
            selected; ``fused=True`` also takes a GradScaler's scale in that pass, without writing unscaled gradients
            back. With ``fused=False`` or ``foreach=True``, and wherever the operator does not reach, the selected
            entries are gathered, stepped by torch's own AdamW, and scattered back. Parameters without a mask are
            always stepped by torch's own AdamW, with these flags.
        masks: which entries train: name -> bool tensor (with named parameters), parameter -> bool tensor, or a sequence
            in the order of the parameters. True = trainable. A parameter without a mask trains densely; one whose mask
            is empty has no state and no step.
        differentiable: not supported.

    State of a masked parameter: ``step``; ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``) of shape (k,), in its
    memory order (C order if it is contiguous); for fp16 and bf16 parameters all fp32, with an fp32 copy ``master`` (k,)
    of the entries.

    Raises:
        TalosError: a mask that matches no parameter, has another shape or is not bool; ``differentiable=True``.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = MaskedAdam([w], lr=0.1, masks=[torch.tensor([True, False])])
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()
        >>> w[1].item()
        1.0
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        masks: Masks | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise TalosError("MaskedAdam does not support differentiable=True; use torch.optim.AdamW")
        self._selections = {}
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, fused=fused,
        )  # fmt: skip
        if masks is not None:
            self._set_masks(self.param_groups, masks)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle carry: torch's part, and which entries are selected."""
        return {**super().__getstate__(), "_selections": self._selections}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may carry ``masks`` for its own parameters."""
        masks = param_group.pop("masks", None)
        super().add_param_group(param_group)
        if masks is not None:
            self._set_masks(self.param_groups[-1:], masks)

    def _set_masks(self, groups: Sequence[Mapping[str, Any]], masks: Masks) -> None:
        for parameter, (name, mask) in masks_by_parameter(groups, masks).items():
            check_mask(name, parameter, mask)
            self._selections[parameter] = select(mask, parameter)
        self._rows = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        self._clip_scale = None
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        live = [p for p in group["params"] if p.grad is not None and self._count(p)]
        for p in live:
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            if not self.state[p]:
                self.state[p] = start(p, self._selections.get(p), group)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        clip_scale = self._clip_scale
        compiled = [p for p in live if compiles(p, self._selections.get(p), group)]
        if compiled:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            scale *= 1.0 if clip_scale is None else clip_scale.item()
            skip = found_inf is not None and bool(found_inf)
            for p in compiled:
                step_compiled(p, self._selections[p], self.state[p], group, scale, skip)
        others = [p for p in live if not compiles(p, self._selections.get(p), group)]
        states = [self.state[p] for p in others]
        gradients = [g for p in others if (g := self._gradient(p)) is not None]
        if clip_scale is not None:
            gradients = [g / clip_scale.to(g.device, g.dtype) for g in gradients]
        step_reference(others, gradients, self._selections, states, group, grad_scale, found_inf)

    def _count(self, p: Tensor) -> int:
        return self._selections[p].count if p in self._selections else p.numel()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with ``mask`` (packed bits, uint8) beside the compact state of each masked parameter."""
        content = super().state_dict()
        for number, p in self._numbered().items():
            if number in content["state"] and p in self._selections:
                content["state"][number] = {**content["state"][number], "mask": pack(self._selections[p].flags())}
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but compact state keeps its dtype, and the masks must be those of this optimizer.

        Raises:
            TalosError: the state was saved under another mask; says how many entries differ.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = {number: state_dict["state"].get(number, {}) for number in numbers}
        for (number, state), p in zip(saved.items(), self._numbered().values(), strict=False):
            self._check_mask(number, p, state)
        super().load_state_dict(state_dict)
        # torch casts every state tensor to its parameter's dtype, which would round fp32 moments to bf16.
        for state, p in zip(saved.values(), self._numbered().values(), strict=True):
            if p in self._selections and state:
                kept = {key: value for key, value in state.items() if key in (*MOMENTS, "master")}
                self.state[p].pop("mask", None)
                self.state[p].update({key: value.to(p.device, copy=True) for key, value in kept.items()})

    def _check_mask(self, number: int, p: Tensor, state: Mapping[str, Any]) -> None:
        mine = pack(self._selections[p].flags()) if p in self._selections else None
        theirs = state.get("mask")
        if state and (mine is None) != (theirs is None):
            raise TalosError(
                f"parameter {number}: saved {'without' if theirs is None else 'with'} a mask, unlike this one"
            )
        if mine is not None and theirs is not None:
            differing = mine.numel() if mine.shape != theirs.shape else int((mine ^ theirs.cpu()).count_nonzero())
            if differing:
                raise TalosError(
                    f"parameter {number}: the state belongs to another mask ({differing} bytes of bits differ)"
                )

    def _numbered(self) -> dict[int, Tensor]:
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))
