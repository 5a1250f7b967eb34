"""`lean_checkpointing`: Hugging Face's gradient checkpointing without what only its reentrant form needs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def lean_checkpointing(model: nn.Module) -> Iterator[None]:
    """Lets the backward pass stop at the lowest layer that trains, and `torch.compile` trace checkpointed layers.

    When checkpointing is on, Hugging Face makes the output of the embeddings require a gradient, and in T5 a position
    bias of zeros. Only reentrant checkpoints need that, and models that use them are left alone. In others it sends the
    backward pass through frozen layers, and it breaks torch.compile's graph, as does the warning that caches are off;
    so both are switched off inside, and restored on exit.
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with ExitStack() as stack:
        if layers and not any(map(_is_reentrant, layers)):
            for module in model.modules():
                _without_input_gradients(module, stack)
            for module in layers:
                _turn_off(getattr(module, "config", None), "use_cache", stack)
                if type(module).__name__.endswith("Attention") and not is_checkpointed_block(module):
                    _turn_off(module, "gradient_checkpointing", stack)
        yield


def is_checkpointed_block(module: nn.Module) -> bool:
    """Whether it is a block of Hugging Face's that checkpoints itself, in training mode only."""
    known = any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)
    return known and bool(getattr(module, "gradient_checkpointing", False))


def _is_reentrant(layer: nn.Module) -> bool:
    """Unless ``use_reentrant=False`` is set: it is torch's default, and was that of transformers until version 4."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


def _turn_off(owner: object, flag: str, stack: ExitStack) -> None:
    if value := getattr(owner, flag, False):
        stack.callback(setattr, owner, flag, value)
        setattr(owner, flag, False)


def _without_input_gradients(module: nn.Module, stack: ExitStack) -> None:
    """Removes, until the stack is left, the hooks by which transformers and peft make inputs require a gradient."""
    hooks = module._forward_hooks
    before = dict(hooks)
    for key, hook in before.items():
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
            del hooks[key]
    taken = before.keys() - hooks.keys()

    def put_back() -> None:
        """In their old order, before hooks that are new."""
        now = dict(hooks)
        hooks.clear()
        hooks.update({key: hook for key, hook in before.items() if key in now or key in taken} | now)

    if taken:
        stack.callback(put_back)
