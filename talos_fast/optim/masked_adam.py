"""`MaskedAdam`: AdamW over the selected entries only, a drop-in for `torch.optim.AdamW`.

Every selected entry moves as under AdamW; the others are never written, weight decay included; and the state of a
parameter with k selected entries is k entries a moment.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from talos_fast.errors import TalosError
from talos_fast.optim import state_dict as saving
from talos_fast.optim.gradients import MaskedGradients
from talos_fast.optim.launches import Launches
from talos_fast.optim.masks import Masks, bool_mask, pack, selections_of, unpack
from talos_fast.optim.selection import select
from talos_fast.optim.state import Member, reselected, start
from talos_fast.optim.stepping import step_others


class MaskedAdam(MaskedGradients):
    """AdamW that moves, decays and keeps state for the selected entries only.

    Positional order, defaults and error texts are AdamW's; without ``masks`` it is AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups; a group may carry its own ``masks``.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in `torch.optim.AdamW`.
        fused, foreach: by default Triton kernels step everything on CUDA, in two launches a group, device and dtype,
            and a C++ operator the masked parameters on the CPU. ``fused=True`` also takes a GradScaler's scale in that
            pass, without writing unscaled gradients back. With ``fused=False`` or ``foreach=True``, and wherever
            neither reaches, torch's own AdamW steps the gathered entries, and parameters without a mask as they are.
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
        self._launches = Launches()
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, fused=fused,
        )  # fmt: skip
        if masks is not None:
            self._selections |= selections_of(self.param_groups, masks)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle carry: torch's part, and the masks as bits."""
        masks = {p: (pack(bool_mask(p, selection)), selection.order) for p, selection in self._selections.items()}
        return {**super().__getstate__(), "_masks": masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of deepcopy and pickle, and, without masks, of torch's load_state_dict."""
        masks = state.pop("_masks", None)
        if masks is not None:
            # In the order that numbers the entries of the state: the parameter may have been laid out anew since.
            self._selections = {p: select(unpack(bits, p.shape), p, order) for p, (bits, order) in masks.items()}
        self._launches = Launches() if masks is not None else self._launches
        super().__setstate__(state)

    def __repr__(self) -> str:
        parameters = self._parameters()
        selected = sum(self._selections[p].count if p in self._selections else p.numel() for p in parameters)
        return f"{super().__repr__()[:-1]}Selected entries: {selected:,} of {sum(p.numel() for p in parameters):,}\n)"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may carry ``masks`` for its own parameters.

        Raises:
            TalosError: as the constructor; or the group is one of Adam's, whose weight decay is not decoupled.
        """
        masks = None
        if isinstance(param_group, dict) and "masks" in param_group:
            param_group = dict(param_group)  # the caller may make another optimizer of it
            masks = param_group.pop("masks")
        if isinstance(param_group, dict) and not param_group.get("decoupled_weight_decay", True):
            raise TalosError(
                "decoupled_weight_decay=False: the decay of MaskedAdam is AdamW's, decoupled; leave it out"
            )
        super().add_param_group(param_group)
        if masks is not None:
            try:
                self._selections |= selections_of(self.param_groups[-1:], masks)
            except BaseException:
                self.param_groups.pop()
                raise
            self._reselect()

    def set_masks(self, masks: Masks) -> None:
        """Changes what trains, in the middle of a run.

        Entries that stay selected keep their moments. New ones start with moments of zero but with the parameter's
        count of steps, so they move fast at first, by up to ``(1 - beta1) / sqrt(1 - beta2)`` times lr; parameters
        that had no selected entry start from nothing.

        Args:
            masks: as for the constructor; they replace all that were.

        Raises:
            TalosError: a mask does not fit; nothing changes.
        """
        selections = selections_of(self.param_groups, masks)
        for p in self._parameters():
            before, after = self._selections.get(p), selections.get(p)
            if after is not None and after.count == 0:
                self.state.pop(p, None)
            elif before is not after and self.state.get(p):
                self.state[p] = reselected(self.state[p], p, before, after)
        self._selections = selections
        self._launches.clear()
        self._reselect()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what ``closure`` returns.

        Raises:
            RuntimeError: a gradient is sparse, or a graph is captured without ``capturable``; in torch's words.
            TalosError: a graph is captured while a parameter has no gradient, or before the first eager step.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = self._divisor(), getattr(self, "found_inf", None)
        if not self._launches.check(self.param_groups, self.state):
            self._follow()
        for group in self.param_groups:
            self._step_group(group, grad_scale, found_inf)
        self._launches.settle(self.param_groups, self.state)
        self._clip = None
        if self._compaction is not None:
            self._compaction.restart()
        return loss

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        gradients = [self._gradient(p) for p in group["params"]]
        launches = self._launches.get(group, gradients)
        # All of them where launches must be built: those point to states, so these come first.
        pairs = self._pairs(group, gradients, range(len(gradients)) if launches is None else launches.others)
        if launches is None:
            launches = self._launches.build(group, gradients, self._selections, self.state)
            if launches is not None:
                pairs = self._pairs(group, gradients, launches.others)
        if launches is not None:
            launches.run(gradients, grad_scale, found_inf)
        if pairs:
            step_others(pairs, group, grad_scale, found_inf)

    def _pairs(
        self, group: dict[str, Any], gradients: Sequence[Tensor | None], places: Iterable[int]
    ) -> list[tuple[Member, Tensor]]:
        """Those at ``places`` in the group that step, with their gradients; the first gives a parameter its state."""
        pairs = []
        for place in places:
            p, gradient = group["params"][place], gradients[place]
            if gradient is None:
                continue
            selection = self._selections.get(p)
            if selection is not None and selection.count == 0:
                continue
            if gradient.is_sparse:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            state = self.state[p]
            if not state:
                state = self.state[p] = start(p, selection, group)
            pairs.append((Member(p, selection, state), gradient))
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """As in torch; masked parameters have compact state, their ``mask`` (packed bits, uint8) and ``shape``.

        `talos_fast.optim.to_adamw` makes AdamW's of it.
        """

        def export(_: Any, content: dict[str, Any]) -> dict[str, Any]:
            return saving.exported(content, self._parameters(), self._selections)

        with self.register_state_dict_post_hook(export, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but compact state keeps its dtype, and the masks must be those of this optimizer.

        Raises:
            TalosError: the state was saved under another mask; says how many entries differ. Nothing is loaded.
        """

        def hold(_: Any, content: dict[str, Any]) -> dict[str, Any]:
            return saving.held(content, self._parameters(), self._names(), self._selections)

        def release(_: Any) -> None:
            saving.release(self.state, self._selections)

        # Registered last, the one hook runs after all of the user's; prepended, the other runs before them.
        with (
            self.register_load_state_dict_pre_hook(hold),
            self.register_load_state_dict_post_hook(release, prepend=True),
        ):
            super().load_state_dict(state_dict)
        self._launches.clear()

    def _names(self) -> list[Any]:
        """What to call the parameters in errors: by name if they have any, else by number."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return names or list(range(len(self._parameters())))
