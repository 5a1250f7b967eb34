"""One batched forward-backward in which every use of a parameter shows its per-sample gradient.

`Capture` is a `TorchFunctionMode`: it sees every torch function that a tracked parameter enters, whatever module calls
it. A function with a rule in `RULES` computes its output, and a hook on it receives the output's gradient, which
together with the input gives the per-sample gradient; no ``.grad`` and no (N, O, I) tensor is made. A function of a
parameter alone (a view, a cast, 1 + γ, a table of positions) gives an *alias*, tracked in its place. Any other function
that sees a parameter leaves it uncovered: its scores must come from elsewhere, they are never taken as 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from talos_fast.sensitivity.alias import Alias, derived
from talos_fast.sensitivity.axis import pattern
from talos_fast.sensitivity.calls import Call, Findings, Site, tapped
from talos_fast.sensitivity.observer import Observer
from talos_fast.sensitivity.registry import ALIASING, CUTTING, RULES, Make, Split, UncoveredError, chooses_rows
from talos_fast.sensitivity.uses import PerSample, Use


class Capture(TorchFunctionMode):
    """Wrap the forward in it, then call `run`.

    Args:
        parameters: name -> tracked parameter, none of which requires a gradient meanwhile.
        samples: N, the number of samples in the batch.
        findings: what is known about the model; completed here.
        square: called with the name and all uses of a parameter, as soon as the last one is there.
        exploring: whether uses whose rows do not belong to samples go to ``findings.shared``, for another forward.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], samples: int, findings: Findings,
        square: Callable[[str, list[Use]], None], exploring: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.samples, self.findings = samples, findings
        self._square, self._exploring = square, exploring
        self._aliases = {id(p): Alias(name, p, p, None, p) for name, p in parameters.items()}
        self._seen: dict[tuple[str, ...], int] = {}
        self._site: Site = ("", (), 0)
        self._aliasing = False
        self._handled: list[int] = []
        self._calls: list[Call] = []
        self._expected: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        self._observer = Observer(samples, findings)
        self._keeping = False
        # Tying it to an output makes that output require a gradient; its own gradient is never looked at.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.findings.changing = self.findings.changing or chooses_rows(func, args, kwargs)
        tracked = self._tracked(args) + (self._tracked(kwargs.values()) if kwargs else [])
        if not tracked or func in CUTTING:
            return func(*args, **kwargs)
        names = tuple(alias.name for alias in tracked)
        if torch._C._are_functorch_transforms_active():
            self._uncover(names, "it is used inside a transform of torch.func")
            return func(*args, **kwargs)
        count = self._seen[names] = self._seen.get(names, -1) + 1
        self._site = (getattr(func, "__name__", str(func)), names, count)
        self._aliasing = func in ALIASING and len({id(alias.tensor) for alias in tracked}) == 1
        self._handled = []
        reason = f"{getattr(func, '__qualname__', func)} has no rule"
        if func in RULES and self._site not in self.findings.shared:
            try:
                output = RULES[func](self, *args, **kwargs)
            except UncoveredError as refusal:
                reason = str(refusal)
            else:
                unseen = [alias.name for alias in tracked if id(alias.tensor) not in self._handled]
                self._uncover(unseen, f"the rule of {self._site[0]} takes it for an activation")
                return output
        output = func(*args, **kwargs)
        if self._aliasing:
            for alias in derived(tracked[0], output, func, args, kwargs):
                self._aliases[id(alias.tensor)] = alias
            return output
        # Shapes, dtypes and numbers carry no gradient; what returns nothing may have written somewhere.
        wrote = output is None and self._site[0] != "__get__"
        if wrote or any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            self._uncover(names, reason)
        return output

    def _tracked(self, values: Iterable[Any]) -> list[Alias]:
        found = []
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._aliases:
                    found.append(self._aliases[id(value)])
            elif isinstance(value, list | tuple):
                found += self._tracked(value)
        return found

    def _uncover(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            self.findings.uncovered.setdefault(name, reason)

    def alias(self, value: object) -> Alias | None:
        """How ``value`` comes from a tracked parameter, None if it does not."""
        return self._aliases.get(id(value))

    def matrix(self, value: Tensor) -> None:
        """Raises `UncoveredError` if ``value`` comes from a parameter but is not a block of its entries, in order."""
        alias = self.alias(value)
        if alias is not None:
            alias.check_matrix()

    def use(
        self, output: Tensor, makes: Mapping[Tensor | None, Make], *inputs: Tensor,
        features: int = 1, view: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> Tensor:  # fmt: skip
        """Hooks ``output``: its gradient, passed to each function, gives the use of that parameter.

        Args:
            output: of the function.
            makes: parameter or alias -> formula of its use; untracked ones and None are passed over.
            *inputs: what the formulas read; modified in place before the backward, the parameters count as uncovered.
            features: how many trailing dimensions of ``view``'s result are features; the others are rows.
            view: brings the gradient into the order (*rows, *features), as the formulas get it.
        """
        pairs = [(self._aliases[id(p)], make) for p, make in makes.items() if id(p) in self._aliases]
        self._handled += [id(alias.tensor) for alias, _ in pairs]
        if not pairs or not torch.is_grad_enabled():
            return output  # without a graph no gradient comes back; a graph made later is not ours to see
        if output.is_nested:
            raise UncoveredError("a nested tensor, whose rows have no axis of samples")
        with torch.no_grad():
            rows = view(output).shape
        rows = rows[: len(rows) - features]
        call = Call(
            self._site, [alias for alias, _ in pairs], [make for _, make in pairs], view, features,
            (self._site, len(self._handled), pattern(rows, self.samples)),
            [(tensor, tensor._version) for tensor in inputs], self._aliasing,
        )  # fmt: skip
        self._calls.append(call)
        self._observer.expect(output)
        for alias in call.aliases:
            self._expected[alias.name] = self._expected.get(alias.name, 0) + 1
        if output.requires_grad and output._is_view():
            # Writing to a view, as q *= scale does, replaces its place in the graph, and a hook there is never called.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        if not output.requires_grad:
            return tapped(self._anchor, output, call.aliases, partial(self._receive, call))
        output.register_hook(partial(self._receive, call))
        return output

    def expand(self, alias_tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A parameter or alias broadcast to ``shape``, as an activation whose gradient is its use.

        The dimensions along which it is broadcast are the rows; one of them must hold the samples.
        """
        padded = (1,) * (len(shape) - alias_tensor.dim()) + tuple(alias_tensor.shape)
        own = [dim for dim, size in enumerate(padded) if size != 1]
        order = [dim for dim, size in enumerate(padded) if size == 1] + own

        def make(gradient: Tensor, split: Split) -> PerSample:
            total = split(gradient, len(own)).sum(1)
            return PerSample(total.reshape(len(total), *alias_tensor.shape))

        view = lambda gradient: gradient.permute(order)  # noqa: E731
        return self.use(alias_tensor.detach().expand(shape), {alias_tensor: make}, features=len(own), view=view)

    def run(self, logits: Tensor, probes: Sequence[Tensor], generator: torch.Generator) -> None:
        """Propagates each of ``probes`` (N, K) back from the logits (N, K), one after the other.

        Args:
            logits: of the forward that was captured.
            probes: constant.
            generator: of the codes.
        """
        if not logits.requires_grad:
            return
        with torch.autocast(logits.device.type, enabled=False):
            for n, coefficients in enumerate(probes):
                self._observer.look(self._calls, logits, coefficients, generator)
                self._backward(logits, coefficients, last=n + 1 == len(probes))

    def _backward(self, logits: Tensor, coefficients: Tensor, last: bool) -> None:
        self._keeping = not last
        (logits * coefficients).sum().backward(retain_graph=not last)
        # A use whose output did not reach the logits has no gradient; the others of its parameter are still waiting.
        for name in list(self._uses):
            self._finish(name)
        self._observer.finish(self._calls)

    def _receive(self, call: Call, gradient: Tensor) -> None:
        gradient = call.view(gradient)
        call.reached = True
        if self._observer.looking:
            return self._observer.receive(call, gradient)
        names = [alias.name for alias in call.aliases]
        axis = self._observer.axis(call, gradient)
        if axis is None:
            if self._exploring and call.aliasing:
                self.findings.shared.add(call.site)
            else:
                self._uncover(names, f"the rows of {call.site[0]} do not belong to one sample each")
        elif any(tensor._version != version for tensor, version in call.inputs):
            self._uncover(names, "its input was modified in place")
        else:
            split = partial(axis.tokens, samples=self.samples)
            for alias, make in zip(call.aliases, call.makes, strict=True):
                if alias.name not in self.findings.uncovered:
                    self._record(
                        alias.name, alias.pull_back(make(gradient, lambda t, features=1: split(t, features=features)))
                    )
        if not self._keeping:
            call.release()

    def _record(self, name: str, use: Use) -> None:
        self._uses.setdefault(name, []).append(use)
        if len(self._uses[name]) == self._expected[name]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        uses = self._uses.pop(name)
        if name not in self.findings.uncovered:
            self._square(name, uses)
