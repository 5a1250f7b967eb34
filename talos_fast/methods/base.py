"""What a method is: it says what trains, with which optimizer, through which forward, and what vector comes of it."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from talos_fast.arguments import check_weight_decay
from talos_fast.batch import Batch
from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.fingerprint import require_base
from talos_fast.forward import Forward
from talos_fast.mask import Mask
from talos_fast.task_vector import TaskVector

Deltas = dict[str, SparseDelta]


@dataclass(frozen=True)
class Options:
    """What only some methods take; None where the user said nothing.

    Args:
        mask: which entries may move.
        density: fraction of the entries that a method selects itself.
        finetuned: the task vector of a full fine-tuning on this task.
        rank: of adapters.
        lora_alpha: adapters act times lora_alpha / rank.
    """

    mask: Mask | None = None
    density: float | None = None
    finetuned: TaskVector | None = None
    rank: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        for name, kind in (("mask", Mask), ("finetuned", TaskVector)):
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise TalosError(f"{name}= is a {type(value).__name__}; give a talos_fast.{kind.__name__}")

    def require_base(self, model: nn.Module) -> None:
        """Refuses a mask or a vector of another model; `TalosError` names the first tensor that differs."""
        for what, recorded in (("the mask", self.mask), ("finetuned=", self.finetuned)):
            if recorded is not None and recorded.base:
                require_base(recorded.base, model, what)


@dataclass(frozen=True)
class Request:
    """What the user asked of a method.

    Args:
        model: the pre-trained model, on its device.
        forward: ``forward(model, batch) -> logits (N, K)``.
        lr: peak learning rate.
        weight_decay: AdamW's, towards zero, of whatever trains.
        options: see `Options`.
        train_first: trains a setup with the same recipe, gives its deltas, and puts the model back.

    Raises:
        TalosError: a weight decay that is negative or not finite.
    """

    model: nn.Module
    forward: Forward
    lr: float
    weight_decay: float
    options: Options
    train_first: Callable[["Setup"], Deltas]

    def __post_init__(self) -> None:
        check_weight_decay(self.weight_decay)


@dataclass(frozen=True)
class Setup:
    """What the trainer runs.

    Args:
        trained: the leaf tensors that move: parameters by their name in the model, or adapters.
        optimizer: over exactly those.
        forward: what is differentiated.
        export: after training, the change of the model's parameters; leaves the trained model in the model's
            parameters.
        mask: which entries of the parameters move, if not all do.
        clip: ``clip(max_norm)`` limits the norm of all gradients (inf only measures) and returns the norm of before;
            by default torch's `clip_grad_norm_` of what is trained.
        around: gives a context to enter around each forward and backward.
        fixed: what the forward reads and nobody writes, beside the parameters of the model that do not train.
        info: provenance (JSON); ``linearized`` says that the vector is evaluated on the linearized model.
    """

    trained: Mapping[str, Tensor]
    optimizer: Optimizer
    forward: Forward
    export: Callable[[], Deltas]
    mask: Mask | None = None
    clip: Callable[[float], Tensor] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    fixed: Collection[Tensor] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def compiled(setup: Setup) -> Setup:
    """The setup with `torch.compile` around its forward."""

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return setup.forward(model, batch)

    # torch limits recompilations of a code object to 8: all runs of a program would share these, and then be eager.
    forward.__code__ = forward.__code__.replace()
    # torch 2.11 cannot copy tangents of symbolic sizes, which a second batch size brings.
    static = torch.__version__ < "2.12" and bool(setup.info.get("linearized"))
    return replace(setup, forward=torch.compile(forward, dynamic=False if static else None))


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        name: what ``finetune(method=…)`` and the vector's ``info`` call it.
        prepare: the request, to what the trainer runs.
        takes: the fields of `Options` that mean something to it.
        lr: peak learning rate where the user names none; the paper's by default.
    """

    name: str
    prepare: Callable[[Request], Setup]
    takes: frozenset[str] = frozenset()
    lr: float = 1e-5

    def check(self, options: Options) -> None:
        """Refuses options that would be ignored.

        Raises:
            TalosError: names the first one.
        """
        for name, value in vars(options).items():
            if value is not None and name not in self.takes:
                takes = f"takes {', '.join(sorted(self.takes))}" if self.takes else "takes none of its kind"
                raise TalosError(f"{name}= means nothing to method {self.name!r}, which {takes}; leave it out")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name.

    Raises:
        TalosError: there is none, or one is complex.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if strange := next((name for name, p in parameters.items() if not p.is_floating_point()), None):
        raise TalosError(f"{strange!r} is {parameters[strange].dtype}; only real numbers train: freeze it")
    if not parameters:
        raise TalosError(f"no parameter of {type(model).__name__} requires a gradient; nothing would train")
    return parameters


def snapshot(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, to take differences from."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def differences(origin: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Deltas:
    """How parameters moved since ``origin``."""
    return {name: SparseDelta.between(name, origin[name], p) for name, p in parameters.items()}
