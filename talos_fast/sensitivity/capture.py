"""One batched forward-backward in which every use of a parameter shows its per-sample gradient, squared on the spot.

`Capture` is a `TorchFunctionMode`: it sees every torch function that a tracked parameter enters, whatever module calls
it, and looks the function up in `RULES`. A rule computes the output and hooks it, so that the backward hands over the
gradient of the output, which together with the input gives the per-sample gradient. No ``.grad`` and no (N, O, I)
tensor is made. A function without a rule marks the parameter as uncovered: its scores must come from elsewhere, they
are never taken as 0.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from talos_fast.ops import accumulate_squared_per_sample_

Rule = Callable[..., Tensor | tuple[Tensor, None]]
RULES: dict[Callable[..., Any], Rule] = {}


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Registers ``handler(capture, *args, **kwargs) -> output`` for torch functions; users may add their own."""

    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


class UncoveredError(Exception):
    """Raised by a rule, before it hooks anything, when it does not apply to these arguments."""


@dataclass(frozen=True)
class Outer:
    """A use of a matrix: sample n's gradient is Σ_t grads[n, t]ᵀ inputs[n, t], viewed as the parameter's shape."""

    inputs: Tensor
    grads: Tensor

    def per_sample(self) -> Iterable[Tensor]:
        """Each sample's gradient, one at a time."""
        return (g.t() @ x for x, g in zip(self.inputs, self.grads, strict=True))


@dataclass(frozen=True)
class PerSample:
    """A use of a small parameter: its per-sample gradients (N, *shape)."""

    grads: Tensor

    def per_sample(self) -> Iterable[Tensor]:
        """Each sample's gradient."""
        return self.grads.unbind()


Use = Outer | PerSample


class Capture(TorchFunctionMode):
    """Wrap the forward in it, then call `backward` on a sum of per-sample scalars.

    Args:
        parameters: name -> tracked parameter, none of which requires a gradient meanwhile.
        samples: N, the number of samples in the batch.
        scores: name -> fp32 or fp64 tensor of the parameter's shape; squares are added to it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], samples: int, scores: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.samples = samples
        self.uncovered: dict[str, str] = {}
        self._scores = scores
        self._names = {id(p): name for name, p in parameters.items()}
        self._expected: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        # Adding it to an output makes that output require a gradient; its own gradient is never looked at.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracked = [
            self._names[id(a)] for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor) and id(a) in self._names
        ]
        if not tracked:
            return func(*args, **kwargs)
        reason = f"{getattr(func, '__qualname__', func)} has no rule"
        if func in RULES:
            try:
                return RULES[func](self, *args, **kwargs)
            except UncoveredError as refusal:
                reason = str(refusal)
        output = func(*args, **kwargs)
        # Shapes, dtypes and the like carry no gradient.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            self.uncovered.update(dict.fromkeys(tracked, reason))
        return output

    def tracks(self, value: object) -> bool:
        """Whether ``value`` is one of the tracked parameters."""
        return id(value) in self._names

    def tokens(self, tensor: Tensor, features: int = 1) -> Tensor:
        """(N, T, *features) of an activation whose rows of one sample are contiguous in its first dimension."""
        if tensor.dim() <= features or tensor.shape[0] == 0 or tensor.shape[0] % self.samples:
            raise UncoveredError(f"an activation of shape {tuple(tensor.shape)} is not led by {self.samples} samples")
        return tensor.reshape(self.samples, -1, *tensor.shape[tensor.dim() - features :])

    def use(self, output: Tensor, uses: Mapping[Tensor | None, Callable[[Tensor], Use]], *inputs: Tensor) -> Tensor:
        """Hooks ``output``: its gradient, passed to each function, gives the use of that parameter.

        Args:
            output: computed from detached parameters.
            uses: parameter -> function of the output's gradient; untracked parameters and None are passed over.
            *inputs: what the functions read; they must not be modified in place before the backward.
        """
        named = {self._names[id(p)]: make for p, make in uses.items() if p is not None and id(p) in self._names}
        if not output.requires_grad:
            output = output + self._anchor.to(output.device)
        for name in named:
            self._expected[name] = self._expected.get(name, 0) + 1
        versions = [tensor._version for tensor in inputs]

        def hook(gradient: Tensor) -> None:
            for name, make in named.items():
                if [tensor._version for tensor in inputs] != versions:
                    self.uncovered[name] = "its input was modified in place"
                if name not in self.uncovered:
                    self._record(name, make(gradient))

        output.register_hook(hook)
        return output

    def backward(self, scalar: Tensor, retain_graph: bool) -> None:
        """Back-propagates and adds the squares; may be called again on the same forward with ``retain_graph``."""
        scalar.backward(retain_graph=retain_graph)
        # A use whose output did not reach the scalar has no gradient; the others of its parameter are still waiting.
        for name in list(self._uses):
            self._square(name)

    def _record(self, name: str, use: Use) -> None:
        self._uses.setdefault(name, []).append(use)
        if len(self._uses[name]) == self._expected[name]:
            self._square(name)

    def _square(self, name: str) -> None:
        """Joins all uses of a parameter within each sample, then squares: (Σ_uses g)², not Σ_uses g²."""
        uses = self._uses.pop(name)
        if name in self.uncovered:
            return
        scores = self._scores[name]
        outers = [use for use in uses if isinstance(use, Outer)]
        small = [use.grads for use in uses if isinstance(use, PerSample)]
        if not small:
            inputs, grads = _joined([use.inputs for use in outers]), _joined([use.grads for use in outers])
            matrix = scores.view(grads.shape[2], inputs.shape[2])
            accumulate_squared_per_sample_(matrix, inputs.to(grads.dtype), grads)
        elif not outers:
            total = sum(small[1:], start=small[0]).to(scores.dtype)
            scores.add_(total.square().sum(0).view(scores.shape))
        else:
            for parts in zip(*(use.per_sample() for use in uses), strict=True):
                gradient = torch.stack([part.reshape(scores.shape).to(scores.dtype) for part in parts]).sum(0)
                scores.addcmul_(gradient, gradient)


def _joined(tokens: list[Tensor]) -> Tensor:
    """Several (N, T_i, F) along the tokens: one sum over t of products is the sum over all uses."""
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
