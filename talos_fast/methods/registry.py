"""Method names."""

from talos_fast.errors import TalosError
from talos_fast.methods.base import Method
from talos_fast.methods.l_lora import l_lora
from talos_fast.methods.linearized import linearized
from talos_fast.methods.lota import lota
from talos_fast.methods.nonlinear import nonlinear
from talos_fast.methods.talos import talos

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nonlinear", nonlinear),
        Method("linearized", linearized),
        Method("l-lora", l_lora, frozenset({"rank", "lora_alpha"})),
        Method("lota", lota, frozenset({"density", "finetuned"})),
        Method("talos", talos, frozenset({"mask"})),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        TalosError: there is none.
    """
    if name not in METHODS:
        raise TalosError(f"method={name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
