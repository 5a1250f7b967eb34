"""A model moved along a task vector: written into its parameters, or by its expansion where the vector is linear."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.linear import Linearized
from talos_fast.task_vector import TaskVector


def movable(model: nn.Module, vector: TaskVector) -> tuple[nn.Module, Edit | Linearized]:
    """How a model moved along a vector is evaluated: the module to call, and what moves it to a coefficient and back.

    Vectors of non-linear fine-tuning are written into the model, those of linearized fine-tuning are a direction of its
    expansion.
    """
    if not vector.linearized:
        return model, Edit(model, vector.deltas)
    expansion = Linearized.along(model, vector)
    return expansion, expansion


@contextmanager
def moved(model: nn.Module, vector: TaskVector, coefficient: float = 1.0) -> Iterator[nn.Module]:
    """The module to call for ``model`` moved along a vector, inside the block; after it the model is bit-identical."""
    module, edit = movable(model, vector)
    try:
        edit.move(coefficient)
        yield module
    finally:
        edit.revert()


def require_parameters(vector: TaskVector, what: str) -> None:
    """Refuses a vector that is no change of parameters.

    Raises:
        TalosError: it was trained on the linearized model.
    """
    if vector.linearized:
        raise TalosError(
            f"{what}: the vector is of a linearized model (method {vector.info.get('method', '?')}), which no "
            "parameters hold; evaluate talos_fast.merge(base, vectors, alpha=…), which is a module"
        )
