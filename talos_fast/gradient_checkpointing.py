"""`unhindered`: Hugging Face's gradient checkpointing without what only its old, reentrant form needs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch import nn


@contextmanager
def unhindered(model: nn.Module) -> Iterator[None]:
    """Lets the backward pass stop at the lowest layer that trains, and `torch.compile` trace checkpointed layers.

    With checkpointing Hugging Face makes the embeddings require a gradient, trained or not, and T5's attention a bias
    of zeros. Only `use_reentrant=True` has no gradients without that, and so keeps it; else it makes the backward pass
    go through every layer, and breaks graphs. So does the warning that caches, on by default, are off with it.
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with ExitStack() as stack:
        if layers and not any(map(_reentrant, layers)):
            for module in model.modules():
                hooks = [key for key, hook in module._forward_hooks.items() if _requires_input_gradients(hook)]
                if hooks:
                    stack.enter_context(patch.dict(module._forward_hooks))
                for key in hooks:
                    del module._forward_hooks[key]
                config = getattr(module, "config", None)
                if getattr(config, "use_cache", False):
                    stack.enter_context(patch.object(config, "use_cache", False))
            for module in layers:
                if type(module).__name__.endswith("Attention"):  # which checkpoints nothing itself
                    stack.enter_context(patch.object(module, "gradient_checkpointing", False))
        yield


def _reentrant(layer: nn.Module) -> bool:
    """Unless it says otherwise: before version 5 that was the default."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def _requires_input_gradients(hook: object) -> bool:
    """Of transformers or peft, which have it by nearly the same name."""
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
