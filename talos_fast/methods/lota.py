"""LoTA (Panda et al. 2024): the entries that a full fine-tuning changed most, trained again from the start."""

from collections.abc import Mapping

import torch
from torch import nn

from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.mask import Mask, resolve_density
from talos_fast.methods.base import Request, Setup, trainable
from talos_fast.methods.masked import masked
from talos_fast.methods.nonlinear import nonlinear


def lota(request: Request) -> Setup:
    """Trains the fraction ``density`` (default 0.1) of all entries with the largest absolute change.

    Without ``finetuned`` the full fine-tuning comes first, with the same recipe, and the model is put back; one
    threshold holds for all parameters. The mask is binary: the released code lets the other entries of vision models
    train a tenth as fast, and with it they all move.

    Raises:
        TalosError: a density out of range, or ``finetuned`` does not come from a full fine-tuning of this model.
    """
    density = resolve_density(request.options.density)
    given = request.options.finetuned
    if given is not None and given.linearized:
        raise TalosError("finetuned=: a vector of a linearized model; method 'lota' needs one of method 'nonlinear'")
    changes = request.first(nonlinear(request)) if given is None else given.deltas
    return masked(request, largest_changes(request.model, changes, density), {"density": density})


def largest_changes(model: nn.Module, changes: Mapping[str, SparseDelta], density: float) -> Mask:
    """Selects exactly ⌊density · N⌋ of the N trainable entries, those with the largest absolute change.

    Raises:
        TalosError: changes of parameters that the model lacks or does not train, or fewer changed entries than that.
    """
    parameters = trainable(model)
    if unknown := sorted(changes.keys() - parameters.keys()):
        raise TalosError(f"finetuned= moves {unknown[0]!r}, which is no trainable parameter of {type(model).__name__}")
    scores = {
        name: changes[name].dense().abs() if name in changes else torch.zeros(p.shape) for name, p in parameters.items()
    }
    selected, moved = Mask.from_scores(scores, density, keep="highest"), sum(len(d.values) for d in changes.values())
    if moved < selected.selected:
        raise TalosError(
            f"finetuned= changed {moved} entries, fewer than the {selected.selected} to select; "
            "give the vector of a full fine-tuning (method 'nonlinear'), or a smaller density"
        )
    return selected
