"""The state in which a model is scored: evaluation mode, eager, no dropout, no recomputation, nothing fused."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from talos_fast.errors import TalosError
from talos_fast.interrupt import uninterrupted
from talos_fast.restoring import restoring_modes
from talos_fast.sensitivity.process_wide import ProcessWide

CACHE = "attention_bias_cache"
"""timm's name for it."""


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter requiring a gradient, eager execution without checkpointing; all restored.

    Checkpointing, compilation and fused attention are the process's: a thread that trains meanwhile does without them.

    Raises:
        TalosError: a batch norm without running statistics, which mixes the samples in evaluation mode too.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        _refuse_batch_statistics(model)
        with (
            torch.inference_mode(False), torch.enable_grad(), _unfused_and_eager(),
            _evaluation_mode(model), _without_caches(model), _sound_batch_norms(model),
        ):  # fmt: skip
            yield
    finally:
        with uninterrupted():
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode by `model.eval()`, or by flags alone if that folds weights into others, as in LoRA layers."""
    modes = {module: module.training for module in model.modules()}
    own = [module for module in modes if type(module).train is not nn.Module.train]
    before = {p: p.detach().clone() for module in own for p in module.parameters()}
    with restoring_modes(model):
        model.eval()
        folded = {p for p, value in before.items() if not torch.equal(p, value)}
        if not folded:
            before.clear()
            for module in modes:  # some overrule the mode
                module.training = False
            yield
            return
    for module in own:  # which `restoring_modes` took for one that had been in evaluation mode all along
        if not modes[module] and any(p in folded for p in module.parameters(recurse=False)):
            module.train()
    with torch.no_grad():
        for p, value in before.items():
            p.copy_(value)  # unfolding rounds
    before.clear()
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        with uninterrupted():
            for module, training in modes.items():
                module.training = training


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


@contextmanager
def _sound_batch_norms(model: nn.Module) -> Iterator[None]:
    """Gives batch norms contiguous gradients: torch 2.14's on the CPU are wrong for one sample in another layout."""

    def watch(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(Tensor.contiguous)

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_hook(watch) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


@ProcessWide
@contextmanager
def _unfused_and_eager() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # The fused attention of nn.MultiheadAttention is one opaque operation, and has no batching rule.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), without_checkpointing():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
