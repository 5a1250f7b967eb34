"""`MaskedAdam`: AdamW over the selected entries only, a drop-in for `torch.optim.AdamW`.

A masked parameter of n entries, k of them selected, is gathered into a vector of k, stepped by torch's own AdamW, and
scattered back. So every selected entry moves as under AdamW, bit for bit; the others are never written, weight decay
included; and the state is k entries a moment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from talos_fast.errors import TalosError
from talos_fast.indexing import gather, scatter_
from talos_fast.optim.masks import Masks, indices_of, masks_by_parameter, pack

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class MaskedAdam(AdamW):
    """AdamW that moves, decays and keeps state for the selected entries only.

    Positional order, defaults and error texts are AdamW's; without ``masks`` it is AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; a group may carry its own ``masks``.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: as in `torch.optim.AdamW`.
        masks: which entries train: name -> bool tensor (with named parameters), parameter -> bool tensor, or a sequence
            in the order of the parameters. True = trainable. A parameter without a mask trains densely; one whose mask
            is empty has no state and no step.
        differentiable: not supported.

    State of a masked parameter: ``step``; ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``) of shape (k,), in the
    flat order of the entries; for fp16 and bf16 parameters all fp32, with an fp32 copy ``master`` (k,) of the entries.

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
        self._indices: dict[Tensor, Tensor] = {}
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, fused=fused,
        )  # fmt: skip
        if masks is not None:
            self._set_masks(self.param_groups, masks)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle carry: torch's part, and which entries are selected."""
        return {**super().__getstate__(), "_indices": self._indices}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may carry ``masks`` for its own parameters."""
        masks = param_group.pop("masks", None)
        super().add_param_group(param_group)
        if masks is not None:
            self._set_masks(self.param_groups[-1:], masks)

    def _set_masks(self, groups: Sequence[Mapping[str, Any]], masks: Masks) -> None:
        for parameter, (name, mask) in masks_by_parameter(groups, masks).items():
            self._indices[parameter] = indices_of(name, parameter, mask)

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
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        live = [p for p in group["params"] if p.grad is not None and len(self._indices.get(p, (0,)))]
        for p in live:
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        compact = [self._compact(p, group) for p in live]
        states = [self.state[p] for p in live]
        tops = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        beta1, beta2 = group["betas"]
        adamw(
            compact, [self._gradient(p) for p in live],
            [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], tops, [s["step"] for s in states],
            foreach=group["foreach"], capturable=group["capturable"], fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
            has_complex=any(p.is_complex() for p in live), amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
        for p, entries in zip(live, compact, strict=True):
            if p in self._indices:
                if "master" in self.state[p]:
                    self.state[p]["master"].copy_(entries)
                scatter_(p, self._indices[p], entries.to(p.dtype))

    def _gradient(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        if p not in self._indices:
            return p.grad
        return gather(p.grad, self._indices[p]).to(_state_dtype(p))

    def _compact(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What AdamW steps in place of ``p``: its selected entries, or ``p`` itself where there is no mask."""
        masked = p in self._indices
        entries = gather(p, self._indices[p]) if masked else p
        wide = entries.to(_state_dtype(p)) if masked else p
        state = self.state[p]
        if not state:
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
            for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
                state[name] = torch.zeros_like(wide, memory_format=torch.preserve_format)
            if wide.dtype != p.dtype:
                state["master"] = wide.clone()
        elif "master" in state:
            # Weights that were loaded or edited since the last step win over the copy that remembers them.
            wide = torch.where(state["master"].to(p.dtype) == entries, state["master"], wide)
        return wide

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with ``mask`` (packed bits, uint8) beside the compact state of each masked parameter."""
        content = super().state_dict()
        for number, p in self._numbered().items():
            if number in content["state"] and p in self._indices:
                content["state"][number] = {**content["state"][number], "mask": pack(self._indices[p], p.numel())}
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
            if p in self._indices and state:
                kept = {key: value for key, value in state.items() if key in (*MOMENTS, "master")}
                self.state[p].pop("mask", None)
                self.state[p].update({key: value.to(p.device, copy=True) for key, value in kept.items()})

    def _check_mask(self, number: int, p: Tensor, state: Mapping[str, Any]) -> None:
        mine = pack(self._indices[p], p.numel()) if p in self._indices else None
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


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
