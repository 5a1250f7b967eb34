"""A pytest plugin (``-p plugin``) that puts torch's CUDA device on the CPU; `run` starts a process where it can."""

import ctypes
import importlib
from functools import partial
from typing import Any

import torch
from libraries import KERNELS, OPERATORS

operators = importlib.import_module(OPERATORS.stem)  # linked to torch, so after it

# These touch no values.
_AS_ON_A_GPU = (
    "view", "as_strided", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "empty.memory_format", "empty_strided",
    "record_stream", "is_pinned", "_pin_memory", "is_set_to", "_local_scalar_dense",
)  # fmt: skip


class Launched:
    """A Triton kernel in its interpreter, whose launches go to the stream."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(a.is_cuda for a in args if isinstance(a, torch.Tensor)), "a kernel was given the host's memory"
            given = [operators.on_cpu(a) if isinstance(a, torch.Tensor) else a for a in args]
            operators.submit(partial(self._kernel[grid], *given, **kwargs))

        return launch


def on_the_device(addresses: Any) -> Any:
    """The same, for tensors of CUDA only: a kernel that reads the host's memory would find it here."""

    def checked(member: Any, *tensors: Any) -> list[int]:
        named = [member.parameter, *member.state.values(), *tensors]
        assert all(t is None or t.is_cuda for t in named), "a table for the device names the host's memory"
        return addresses(member, *tensors)

    return checked


def _install() -> None:
    torch.cuda.init()
    operators.install(list(_AS_ON_A_GPU))
    # Libraries of NVIDIA's, which no CPU runs.
    torch.backends.cudnn.enabled = False
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    from talos_fast.kernels import compact, masked_adam

    import talos_fast.ops
    from talos_fast.optim import launch

    ctypes.CDLL(str(KERNELS))
    talos_fast.ops._no_cuda = None
    for module, names in ((masked_adam, ("advance", "update")), (compact, ("compact_gradient",))):
        for name in names:
            setattr(module, name, Launched(getattr(module, name)))
    launch.addresses = on_the_device(launch.addresses)


_install()
