"""The methods as the paper's released code computes them, where that changes numbers: ``compat="released"``.

Its vision and its language code differ. Which one a model gets is told by its convolutions: vision transformers have
one, T5 has none.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from talos_fast.batch import Batch
from talos_fast.forward import functional_forward
from talos_fast.mask import Mask
from talos_fast.methods.base import Deltas, Request, Setup, differences, snapshot
from talos_fast.methods.l_lora import ADAPTED, lora_adapters, lora_changes, rank_and_alpha
from talos_fast.methods.lota import lota_mask
from talos_fast.methods.masked import masked
from talos_fast.methods.talos import talos_mask
from talos_fast.sensitivity.selection import maskable_parameters
from talos_fast.structure import parts

SOFT = 0.1
ATTENTION = ("query", "key", "value", "attention output")


class ScoredAdamW(AdamW):
    """AdamW whose every entry has a learning rate of its own, lr times a score in [0, 1]: weight decay included.

    θ + s · (AdamW(θ) - θ): the update is linear in lr, so scaling it is scaling lr.

    Args:
        scores: parameter -> s, of its shape.
        options: of AdamW.
    """

    def __init__(self, scores: Mapping[Tensor, Tensor], **options: Any) -> None:
        super().__init__(list(scores), **options)
        self._scores = dict(scores)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        before = {p: p.clone() for p in self._scores if p.grad is not None}
        loss = super().step(closure)
        for p, start in before.items():
            p.copy_(torch.lerp(start, p, self._scores[p]))
        return loss


def talos(request: Request) -> Setup:
    """TaLoS as released: raw parameters train densely beside the mask, and clipping counts every entry.

    A raw parameter is one that a module with children holds itself and no mask covers: CLIP's ``class_embedding``,
    ``positional_embedding`` and ``proj``. Masks leave them out, and the released code forgets to freeze them, so the
    vector is not sparse on them, and the backward pass reaches the very input. `talos_fast.methods.talos` freezes them.
    Language models have none. The norm that is clipped is of whole tensors, entries that never move included.

    Raises:
        TalosError: as `talos_fast.methods.talos`.
    """
    return _masked(request, talos_mask(request), {})


def lota(request: Request) -> Setup:
    """LoTA as released. Vision: entries that are not selected train too, a tenth as fast; raw parameters densely.

    Language: they are frozen, as in `talos_fast.methods.lota`. Both choose among the maskable entries only, so that
    embeddings stay frozen, and clip by the norm of all entries.

    Raises:
        TalosError: as `talos_fast.methods.lota`.
    """
    maskable = maskable_parameters(request.model)
    density, mask = lota_mask(request, list(maskable))
    if not is_vision(request.model):
        return _masked(request, mask, {"density": density})
    trained = maskable | raw_parameters(request.model)
    for name, p in request.model.named_parameters():
        p.requires_grad_(name in trained)
    scores: dict[Tensor, Tensor] = {
        p: mask[name].to(p) * (1 - SOFT) + SOFT if name in maskable else torch.ones_like(p)
        for name, p in trained.items()
    }
    origin = snapshot(trained)
    optimizer = ScoredAdamW(scores, lr=request.lr, weight_decay=request.weight_decay, fused=True)
    info = {"density": density, "soft": SOFT, "compat": "released", "selected": mask.digest()}
    return Setup(trained, optimizer, request.forward, lambda: differences(origin, trained), info=info)


def l_lora(request: Request) -> Setup:
    """L-LoRA as released: W + s B A0 in a network that stays non-linear, whose weights W train as well.

    Each adapter is linearized by itself, (B A0 + B0 (A - A0)) x = B A0 x, so A never learns. Vision: s is lora_alpha
    and not lora_alpha / r, A0 Xavier-uniform / 4, and all of attention's own weights and biases train. Language: s is
    lora_alpha / r, A0 Kaiming-uniform, and the weights of queries and values train. (That released script ends in an
    error before its first step.) A0 is the same for all tasks here, drawn anew for each there; the vector is the exact
    dense change, so adding vectors does not combine B of one task with A0 of another.

    Raises:
        TalosError: as `talos_fast.methods.l_lora`.
    """
    rank, alpha = rank_and_alpha(request.options)
    vision, adapters = is_vision(request.model), lora_adapters(request.model, rank)
    if vision:
        adapters = [replace(a, a=a.a * math.sqrt(a.a.shape[1] * 6 / (rank + a.a.shape[1])) / 4) for a in adapters]
    scale = alpha if vision else alpha / rank
    parameters = dict(request.model.named_parameters())
    thawed = {name: p for name, p in parameters.items() if p.requires_grad}
    attention = _attention(thawed, ATTENTION if vision else ADAPTED, biases=vision)
    base = {name: p for name, p in thawed.items() if name in attention}  # each process has a set in an order of its own
    for name, p in parameters.items():
        p.requires_grad_(name in base)
    origin = snapshot(base)

    def moved() -> dict[str, Tensor]:
        changes = lora_changes(adapters, parameters, scale)
        return {name: parameters[name] + change.dense() for name, change in changes.items()}

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return functional_forward(request.forward, model, moved(), batch)

    @torch.no_grad()
    def export() -> Deltas:
        for name, value in moved().items():
            parameters[name].copy_(value)
        return differences(origin, base)

    trained: dict[str, Tensor] = {**base, **{adapter.label: adapter.b for adapter in adapters}}
    optimizer = AdamW(trained.values(), lr=request.lr, weight_decay=request.weight_decay, fused=True)
    info = {"rank": rank, "lora_alpha": alpha, "compat": "released"}
    return Setup(trained, optimizer, forward, export, info=info)


def is_vision(model: nn.Module) -> bool:
    """Whether a model has a convolution."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def raw_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters that a module with children holds itself, and no mask covers by default."""
    maskable, found = maskable_parameters(model), {}
    for prefix, module in model.named_modules():
        if next(module.children(), None) is not None:
            for name, p in module.named_parameters(prefix, recurse=False):
                if name not in maskable and p.requires_grad:
                    found[name] = p
    return found


def _masked(request: Request, mask: Mask, info: dict[str, Any]) -> Setup:
    """`masked` with the raw parameters, without compacted gradients: the norm is of all entries."""
    raw = raw_parameters(request.model)
    whole = Mask({**mask, **{name: torch.ones(p.shape, dtype=torch.bool) for name, p in raw.items()}}, info=mask.info)
    return replace(masked(request, whole, {**info, "compat": "released"}, entries="all"), around=nullcontext)


def _attention(parameters: Mapping[str, Tensor], kinds: tuple[str, ...], biases: bool) -> set[str]:
    """The weights that hold a part of one of the kinds, and their biases."""
    found = set()
    for name, p in parameters.items():
        if any(part.kind in kinds for part in parts(name, tuple(p.shape))):
            bias = name.removesuffix("weight") + "bias"
            found |= {name, *({bias} if biases and bias in parameters else ())}
    return found
