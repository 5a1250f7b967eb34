"""LoTA (Panda et al. 2024): the entries that a full fine-tuning changed most, trained again from the start."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from talos_fast.arguments import resolve_density
from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.methods.base import Request, Setup, trainable
from talos_fast.methods.masked import masked
from talos_fast.methods.nonlinear import nonlinear


def lota(request: Request) -> Setup:
    """Trains the fraction ``density`` (default 0.1) of all entries with the largest absolute change.

    Without ``finetuned`` the full fine-tuning comes first, with the same recipe, and the model is put back; one
    threshold holds for all parameters. The mask is binary: the released code lets the other entries of vision models
    train a tenth as fast, so that all move (`talos_fast.methods.released`).

    Raises:
        TalosError: a density out of range, or ``finetuned`` does not come from a full fine-tuning of this model.
    """
    density, mask = lota_mask(request, list(trainable(request.model)))
    return masked(request, mask, {"density": density})


def lota_mask(request: Request, names: Iterable[str]) -> tuple[float, Mask]:
    """The density, and the mask of the named parameters; without ``finetuned`` a full fine-tuning comes first."""
    density = resolve_density(request.options.density)
    given = request.options.finetuned
    if given is not None and given.linearized:
        raise TalosError("finetuned=: a vector of a linearized model; method 'lota' needs one of method 'nonlinear'")
    changes = request.train_first(nonlinear(request)) if given is None else given.deltas
    return density, largest_changes(request.model, changes, density, names)


def largest_changes(model: nn.Module, changes: Mapping[str, SparseDelta], density: float, names: Iterable[str]) -> Mask:
    """Selects exactly ⌊density · N⌋ of the N entries of the named parameters, those with the largest absolute change.

    Raises:
        TalosError: changes of parameters that the model lacks or does not train, or fewer changed entries than that.
    """
    parameters = trainable(model)
    if unknown := sorted(changes.keys() - parameters.keys()):
        raise TalosError(f"finetuned= moves {unknown[0]!r}, which is no trainable parameter of {type(model).__name__}")
    chosen = {name: parameters[name] for name in names}
    scores = {
        name: changes[name].dense().abs() if name in changes else torch.zeros_like(p, requires_grad=False)
        for name, p in chosen.items()
    }
    selected = Mask.from_scores(scores, density, keep="highest")
    moved = sum(len(delta.values) for name, delta in changes.items() if name in chosen)
    if moved < selected.selected:
        raise TalosError(
            f"finetuned= changed {moved} entries, fewer than the {selected.selected} to select; "
            "give the vector of a full fine-tuning (method 'nonlinear'), or a smaller density"
        )
    return selected
