"""Per-sample squared gradients without capture: torch.func for what no rule covers, a plain loop as the judge."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from talos_fast.batch import Batch, map_tensors, take, tensors_of
from talos_fast.errors import TalosError
from talos_fast.forward import Forward, functional_forward
from talos_fast.sensitivity.process_wide import ProcessWide
from talos_fast.sensitivity.uses import Accumulator

logger = logging.getLogger("talos_fast")

# Entries of per-sample gradients that vmap may hold at once: 256 MB in fp32.
CHUNK_ENTRIES = 2**26


def add_squares_by_func(
    model: nn.Module, parameters: Mapping[str, Tensor], ledger: Mapping[str, Accumulator],
    forward: Forward, batch: Batch, probe: Tensor,
) -> None:  # fmt: skip
    """Adds Σ_n (∂ probe[n]·f(x_n) / ∂θ)² in chunks of bounded memory: by vmap, or one by one where vmap refuses.

    Args:
        model: evaluated sample by sample.
        parameters: the ones to differentiate, by name in the model.
        ledger: name -> where the squares go.
        forward: the user's hook.
        batch: of N samples; every tensor led by N is split.
        probe: (N, K), constant.
    """
    samples = len(probe)
    chunk = max(1, CHUNK_ENTRIES // sum(parameter.numel() for parameter in parameters.values()))
    for start in range(0, samples, chunk):
        stop = min(samples, start + chunk)
        try:
            found = _by_vmap(model, parameters, forward, batch, probe, range(start, stop))
        except (torch.OutOfMemoryError, TalosError):
            raise
        except Exception as refusal:  # of torch, or of a model that asks for values and does not get them
            logger.info("vmap refuses this model (%s); one backward a sample instead", str(refusal).split("\n")[0])

            def receive(name: str, gradient: Tensor) -> None:
                ledger[name].add(gradient.to(ledger[name].values.dtype).square())

            for _ in gradients_one_by_one(model, parameters, forward, batch, probe, receive, range(start, stop)):
                pass
        else:
            for name, gradients in found.items():
                ledger[name].add(gradients.to(ledger[name].values.dtype).square().sum(0))


def _by_vmap(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    forward: Forward,
    batch: Batch,
    probe: Tensor,
    numbers: range,
) -> dict[str, Tensor]:
    """Name -> per-sample gradients (N, *shape), by ``vmap(grad)``."""

    def is_led_by_samples(tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == len(probe)

    rows = [tensor[numbers.start : numbers.stop] for tensor in tensors_of(batch) if is_led_by_samples(tensor)]

    def scalar(tracked: dict[str, Tensor], coefficients: Tensor, *rows: Tensor) -> Tensor:
        split = iter(rows)
        one = map_tensors(lambda tensor: next(split)[None] if is_led_by_samples(tensor) else tensor, batch)
        logits = functional_forward(forward, model, tracked, one)
        total: Tensor = (logits[0] * coefficients).sum()
        return total

    tracked = {name: parameter.detach() for name, parameter in parameters.items()}
    per_sample: Callable[..., dict[str, Tensor]] = vmap(grad(scalar), in_dims=(None, *[0] * (len(rows) + 1)))
    with _no_casts(), _unwritten(model):
        return per_sample(tracked, probe[numbers.start : numbers.stop], *rows)


@contextmanager
def _unwritten(model: nn.Module) -> Iterator[None]:
    """Takes back what the forward wrote into modules, such as attention maps: a transform's tensors die with it."""
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in plain]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _refuse_to_cast(module: nn.Module, *args: object, **kwargs: object) -> None:
    """In place of what `Module.to` calls: casts in a forward would write a transform's tensors into the model."""
    raise RuntimeError(f"{type(module).__name__} is cast or moved in the forward")


_no_casts = ProcessWide(lambda: patch.object(nn.Module, "_apply", _refuse_to_cast))


def gradients_one_by_one(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, probe: Tensor,
    receive: Callable[[str, Tensor], object], numbers: range | None = None, size: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """For each sample, in a batch of its own: its logits (K,), after all its gradients went to ``receive``.

    A gradient is received by name as soon as it is complete, and then freed: no two are held at once.
    """
    for n in range(len(probe)) if numbers is None else numbers:
        coefficients = probe[n]
        with _receiving(parameters, receive):
            single = forward(model, take(batch, n, n + 1, size or len(probe)))
            if not single.requires_grad:
                raise TalosError("the logits do not depend on any maskable parameter; pass include= with others")
            (single[0] * coefficients).sum().backward()
        yield single[0].detach()


@contextmanager
def _receiving(parameters: Mapping[str, Tensor], receive: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Gradients that a backward leaves in the parameters go to ``receive`` instead; restores theirs on exit.

    Raises:
        TalosError: a backward within the backward (a checkpoint of the model's own) brought a gradient in parts.
    """
    received = set()

    def hook(name: str) -> Callable[[Tensor], None]:
        def taken(tensor: Tensor) -> None:
            assert tensor.grad is not None
            gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
            if name in received:
                raise TalosError(f"{name!r} gets its gradient in parts, from a backward inside the backward; call the "
                                 "model without its checkpointing: smaller batches save as much")  # fmt: skip
            received.add(name)
            receive(name, gradient)
            tensor.grad = None

        return taken

    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor in parameters.values()]
    hooks = []
    try:
        for name, tensor in parameters.items():
            tensor.grad = None
            hooks.append(tensor.requires_grad_(True).register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for tensor, flag, gradient in before:
            tensor.grad = gradient
            tensor.requires_grad_(flag)
