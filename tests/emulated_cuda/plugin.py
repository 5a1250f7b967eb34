"""A pytest plugin (``-p plugin``) that puts torch's CUDA device on the CPU; `run` starts a process where it can."""

import atexit
import ctypes
import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from libraries import KERNELS, OPERATORS
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import GridExecutor, TensorHandle

operators = importlib.import_module(OPERATORS.stem)  # linked to torch, so after it

# These touch no values.
_AS_ON_A_GPU = (
    "view", "as_strided", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "set_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "empty.memory_format", "empty_strided",
    "record_stream", "is_pinned", "_pin_memory", "is_set_to", "_local_scalar_dense",
)  # fmt: skip


def launched(run: Any) -> Any:
    """The same, of Triton's interpreter, for the emulated device: the kernel goes to the stream."""

    def launch(grid: Any, *args: Any, **kwargs: Any) -> None:
        assert all(a.is_cuda for a in args if isinstance(a, torch.Tensor)), "a kernel was given the host's memory"
        given = [operators.on_cpu(a) if isinstance(a, torch.Tensor) else a for a in args]
        operators.submit(partial(run, grid, *given, **kwargs))

    return launch


class Libdevice:
    """NVIDIA's functions that torch.compile's kernels call, by torch's of the same name."""

    def __getattr__(self, name: str) -> Any:
        def call(*args: tl.tensor) -> tl.tensor:
            values = getattr(torch, name)(*(torch.from_numpy(a.handle.data) for a in args))
            return tl.tensor(TensorHandle(values.numpy(), args[0].handle.dtype), args[0].type)

        return call


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
    torch.cuda._sleep = lambda cycles: None  # a kernel of torch's own; nothing here has a clock
    GridExecutor.__call__ = launched(GridExecutor.__call__)
    triton_helpers.libdevice, triton_helpers.set_driver_to_gpu = Libdevice(), lambda: None
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    import talos_fast.ops
    from talos_fast.optim import launch

    ctypes.CDLL(str(KERNELS))
    talos_fast.ops._no_cuda = None
    launch.addresses = on_the_device(launch.addresses)
    atexit.register(torch.cuda.synchronize)  # work that still waits holds objects of Python


_install()
