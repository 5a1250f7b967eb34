"""Which modules are accepted, what is inside their wrappers, and on which device."""

from typing import cast

import torch
from torch import nn

from talos_fast.errors import TalosError, brief


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is.

    Raises:
        TalosError: there is none, or it has no numbers.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise TalosError(f"{type(model).__name__} has no parameters")
    if parameter.is_meta:
        raise TalosError(f"{type(model).__name__} is on the meta device, without numbers; load its weights first")
    return parameter.device


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile; prefixes are no part of names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif _is_compiled(model):
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made it; importing its class would import the compiler."""
    return any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)


def require_plain(model: nn.Module) -> None:
    """Refuses a module that is compiled, itself or in part, or wrapped for several devices.

    Methods swap parameters and torch functions around a forward, which compiled code does not see: linearized training
    lost its gradient there. And with a wrapper's prefix names would not be those of the base.

    Raises:
        TalosError: names the module; or the model is on the meta device.
    """
    device_of(model)
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if _is_compiled(module) or module._compiled_call_impl is not None:
            raise TalosError(f"{where}: the module is compiled; pass the plain one, with compile=True")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TalosError(
                f"{where}: pass the .module inside; finetune itself averages gradients over the ranks of "
                "torch.distributed"
            )


def usable_device(device: torch.device | str, what: str) -> torch.device:
    """A device that tensors can be made on, and read from.

    Raises:
        TalosError: torch does not know it, or this machine lacks it; ``what`` names the argument.
    """
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).cpu()  # "meta" makes them, and has no data
    except (RuntimeError, AssertionError, ImportError) as error:
        raise TalosError(
            f"{what}: {device!s} cannot be used ({brief(error)}); use 'cpu', or a device of this machine"
        ) from error
    return where
