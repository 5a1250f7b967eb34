"""What a masked optimizer does with its gradients before the step: clip, compact, and not compute them."""

import weakref

import torch
from torch import Tensor
from torch.optim import AdamW

from talos_fast.errors import TalosError
from talos_fast.optim.clip import Clip, check_clip, total_norm
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.compaction import Compaction, Entries
from talos_fast.optim.rows import SelectedRows
from talos_fast.optim.selection import Selection


class MaskedGradients(AdamW):
    """The part of `MaskedAdam` that is about gradients."""

    _selections: dict[Tensor, Selection]
    # Not carried by deepcopy and pickle: they belong to these very parameters, and to the step to come.
    _clip: Clip | None = None
    _compaction: Compaction | None = None
    _rows: SelectedRows | None = None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradient(self, p: Tensor) -> Tensor | None:
        """What a step reads: ``p.grad``, or of a compacted parameter the selected entries, (k,) in memory order."""
        gradient = p.grad
        if not isinstance(gradient, CompactGradient):
            return gradient
        gradient.require(self._selections.get(p))
        return gradient.values

    def clip_grad_norm_(self, max_norm: float, entries: Entries = "all", error_if_nonfinite: bool = False) -> Tensor:
        """Has the next `step` divide its gradients so that their 2-norm is at most ``max_norm``; rewrites none.

        Like `torch.nn.utils.clip_grad_norm_` over this optimizer's parameters, but without its pass over the gradients
        and without a sync. With a GradScaler call ``scaler.unscale_(optimizer)`` first; with ``fused=True`` that may be
        skipped, since the step knows the scale: the norm returned here is then still multiplied by it. A second call
        before the step replaces the first; `zero_grad` forgets it.

        Args:
            max_norm: the largest norm; inf only measures.
            entries: whose norm: "all" entries that have a gradient, as torch, or the "selected" ones, which step.
            error_if_nonfinite: raise if the norm is NaN or infinite (which waits for the device).

        Returns:
            The norm before clipping, 0-d, float32 or float64.

        Raises:
            TalosError: ``max_norm`` is negative or NaN; "all", where compacted gradients cannot tell.
            RuntimeError: a norm that is not finite, if asked for.
        """
        check_clip(max_norm, entries)
        self._follow()
        norm = total_norm(self._parameters(), self._selections, entries, error_if_nonfinite)
        self._clip = Clip(norm, max_norm)
        return norm

    def _divisor(self) -> Tensor | None:
        """What the step divides gradients by: GradScaler's scale (set with ``fused=True``) times what clips."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if self._clip is None:
            return scale
        divisor = self._clip.divisor(scale)
        return divisor if scale is None else scale * divisor.to(scale.device)

    def compact_gradients(self, norm: Entries = "selected", accumulate: int = 1) -> Compaction:
        """From now on keeps of each masked parameter's gradient, as soon as it is complete, its selected entries only.

        The backward pass then never holds two dense gradients: ``p.grad`` is a `CompactGradient`. Accumulation, either
        clipping, GradScaler and `zero_grad` work as before; a GradScaler sees infinities in selected entries only.
        Parameters without a mask keep dense gradients. Call it again after the model was moved to another device, and
        on an optimizer that was copied or unpickled: hooks belong to the parameters they were put on. Not under
        DistributedDataParallel, which moves whole gradients.

        Args:
            norm: "all" also keeps the norm of each whole gradient, for ``clip_grad_norm_(entries="all")``.
            accumulate: backward passes a step, which "all" has to know: the norm of a sum needs all entries of every
                term, so gradients stay whole until the last pass. After more passes than that the norm is refused.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        if norm not in ("all", "selected"):
            raise TalosError(f"norm={norm!r}: choose 'all' or 'selected'")
        if accumulate < 1:
            raise TalosError(f"accumulate={accumulate}: a step takes at least one backward pass")
        self._follow()
        if self._compaction is not None:
            self._compaction.remove()
        self._compaction = Compaction(self._selections, norm, accumulate)
        if self._rows is not None:
            self._rows.attach(self._selections, self._compaction)
        weakref.finalize(self, self._compaction.remove)
        return self._compaction

    def _follow(self) -> None:
        """Takes the masks to where their parameters are: a model may be moved after its optimizer was made."""
        if torch.compiler.is_compiling():
            return
        moved = {p: one.to(p.device) for p, one in self._selections.items() if one.work.device != p.device}
        if moved:
            self._selections |= moved
            self._reselect()

    def _reselect(self) -> None:
        """After a change of masks: what was derived from them is made anew."""
        if self._compaction is not None and not self._compaction.removed:
            self._compaction.attach(self._selections)
        if self._rows is not None:  # in place: a caller may hold it
            self._rows.attach(self._selections, self._compaction)

    def selected_rows(self) -> SelectedRows:
        """The context in which linear layers compute the gradients of rows with selected entries only.

        Enter it around forward and backward; see `SelectedRows`. With `compact_gradients` called before, the product's
        selected entries are all that is ever kept of a weight's gradient; they come to ``p.grad`` past autograd, which
        calls no hook on them, and finds no weight in ``torch.autograd.grad`` and ``backward(inputs=...)``. The norm of
        "all" entries is here of those that are computed.
        """
        self._follow()
        if self._rows is None:
            self._rows = SelectedRows(self._selections, self._compaction)
        return self._rows

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; a clipping that no step has taken is forgotten."""
        if self._clip is not None:  # dynamo of torch 2.11 refuses to set it to None
            self._clip = None
        if self._compaction is not None:
            self._compaction.restart()
            if not set_to_none and self._compaction.keeps_sums_whole:
                for p in self._selections:
                    if isinstance(p.grad, CompactGradient):
                        p.grad = torch.zeros_like(p)
        super().zero_grad(set_to_none)
