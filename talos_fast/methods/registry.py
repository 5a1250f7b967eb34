"""Method names."""

from talos_fast.errors import TalosError
from talos_fast.methods.base import Method
from talos_fast.methods.nonlinear import nonlinear
from talos_fast.methods.talos import talos

METHODS: dict[str, Method] = {"nonlinear": nonlinear, "talos": talos}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        TalosError: there is none.
    """
    if name not in METHODS:
        raise TalosError(f"method={name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
