"""The compiled operators: loading them, registering what runs without them, and saying so.

Each operator has its plain-torch reference in a module of its own, beside what torch.compile needs to know of it. Every
backend is tested against the reference, which runs wherever a compiled one is missing.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_logger = logging.getLogger("talos_fast")


def _load(name: str) -> str | None:
    """Imports a compiled library, which registers its operators; returns why it is missing, else None."""
    try:
        importlib.import_module(f"talos_fast.{name}")
    except ImportError as error:
        return str(error)
    return None


_no_cpp = _load("_C")
_no_cuda = "torch is built without CUDA" if torch.version.cuda is None else _no_cpp or _load("_C_cuda")


def backend(device: torch.device | str) -> str:
    """Names what computes on ``device``: ``"cuda"`` or ``"cpp"`` for the compiled libraries, else ``"torch"``."""
    kind = torch.device(device).type
    if kind == "cuda" and _no_cuda is None:
        return "cuda"
    return "cpp" if kind == "cpu" and _no_cpp is None else "torch"


@cache
def announce_fallback(kind: str) -> None:
    """Says once for each kind of device that plain torch computes, why, and what to install."""
    if kind == "cpu":
        library, reason, remedy = "C++ library", _no_cpp, "a C++ compiler"
    elif kind == "cuda":
        library, reason, remedy = "CUDA library", _no_cuda, "the CUDA toolkit (nvcc) of torch's major CUDA version"
    else:
        library, reason, remedy = "library", f"none is written for {kind}", "nothing to install"
    _logger.warning(
        "talos_fast computes in plain torch on %s, more slowly: its %s is missing (%s). To get it: %s, then reinstall.",
        kind, library, reason, remedy,
    )  # fmt: skip


library = torch.library.Library("talos_fast", "FRAGMENT")


def _nothing(*_args: object, **_kwargs: object) -> None:
    """The fake of an operator that writes in place: nothing comes out."""


def register(schema: str, reference: Callable[..., None], fake: Callable[..., None] = _nothing) -> None:
    """Registers ``torch.ops.talos_fast.*`` with a reference to fall back on: a kernel compiled for the device is first.

    Args:
        schema: of an operator that writes in place and returns nothing; the C++ library, if there is one, has it too.
        reference: runs on any device.
        fake: what torch.compile calls instead: it may refuse the arguments.
    """
    name = schema.partition("(")[0]
    if _no_cpp is not None:
        library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"talos_fast::{name}", fake, lib=library)


@cache
def triton_kernels(name: str, what: str) -> Any:
    """A module of `talos_fast.kernels`, imported when the first tensor needs it; None without Triton, said once.

    Args:
        name: of the module.
        what: is done in plain torch without it, such as "MaskedAdam steps".
    """
    try:
        return importlib.import_module(f"talos_fast.kernels.{name}")
    except ImportError as error:
        _logger.warning(
            "%s in plain torch on CUDA, more slowly: Triton cannot be imported (%s). To get it: pip install triton",
            what, error,
        )  # fmt: skip
        return None
