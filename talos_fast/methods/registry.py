"""Method names."""

from typing import Literal

from talos_fast.errors import TalosError
from talos_fast.methods import released
from talos_fast.methods.base import Method
from talos_fast.methods.l_lora import l_lora
from talos_fast.methods.linearized import linearized
from talos_fast.methods.lota import lota
from talos_fast.methods.nonlinear import nonlinear
from talos_fast.methods.talos import talos

# Where little can move, the rate that was best on three small models was 3 to 300 times that of full fine-tuning, in
# the geometric mean 20 to 30 times (benchmarks/results/accuracy/table.md).
SPARSE_LR = 3e-4

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nonlinear", nonlinear),
        Method("linearized", linearized),
        Method("l-lora", l_lora, frozenset({"rank", "lora_alpha"}), SPARSE_LR),
        Method("lota", lota, frozenset({"density", "finetuned"})),
        Method("talos", talos, frozenset({"mask"}), SPARSE_LR),
    )
}


RELEASED = {
    method.name: method
    for method in (
        Method("l-lora", released.l_lora, METHODS["l-lora"].takes),
        Method("lota", released.lota, METHODS["lota"].takes),
        Method("talos", released.talos, METHODS["talos"].takes),
    )
}

Compat = Literal["paper", "released"]


def get_method(name: str, compat: Compat = "paper") -> Method:
    """The method called ``name``, as the paper defines it or as its released code computes it.

    Raises:
        TalosError: there is none.
    """
    if name not in METHODS:
        raise TalosError(f"method={name!r}: choose one of {', '.join(METHODS)}")
    if compat not in ("paper", "released"):
        raise TalosError(f"compat={compat!r}: choose 'paper' or 'released'")
    return (METHODS | RELEASED if compat == "released" else METHODS)[name]
