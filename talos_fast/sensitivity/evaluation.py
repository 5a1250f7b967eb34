"""The state in which a model is scored: evaluation mode, eager, no dropout, no recomputation, nothing fused."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import nn

from talos_fast.errors import TalosError
from talos_fast.forward import Batch, map_tensors

CACHE = "attention_bias_cache"
"""timm's name for it."""


def differentiable(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made under `torch.inference_mode`, which autograd refuses."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter requiring a gradient, eager execution without checkpointing; all restored.

    Raises:
        TalosError: a batch norm without running statistics, which mixes the samples in evaluation mode too.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval().requires_grad_(False)
        _refuse_batch_statistics(model)
        # The fused attention of nn.MultiheadAttention is one opaque operation, and has no batching rule.
        torch.backends.mha.set_fastpath_enabled(False)
        eager = torch.compiler.set_stance("force_eager")
        with torch.inference_mode(False), torch.enable_grad(), eager, without_checkpointing(), _without_caches(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Empties before each forward what LeViT and its kind keep of their attention biases in evaluation mode."""
    caching = [module for module in model.modules() if isinstance(getattr(module, CACHE, None), dict)]
    hooks = [module.register_forward_pre_hook(lambda one, _: getattr(one, CACHE).clear()) for module in caching]
    try:
        yield
    finally:
        for module, hook in zip(caching, hooks, strict=True):
            hook.remove()
            getattr(module, CACHE).clear()


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise TalosError(
                f"{name!r} is a {type(module).__name__} without running statistics, so the samples of a batch have no "
                "gradients of their own; use track_running_stats=True, or a norm over features"
            )


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Lets `torch.utils.checkpoint.checkpoint` call its function, in both of its variants.

    Recomputation happens in the backward, where nothing is captured. Smaller batches save the same memory, and the
    scores do not depend on the batch size.
    """
    module = torch.utils.checkpoint

    def call(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    with ExitStack() as stack:
        stack.enter_context(patch.object(module.CheckpointFunction, "apply", call))
        for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, nothing))
        yield
