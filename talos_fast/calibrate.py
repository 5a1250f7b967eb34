"""`calibrate`: find the entries that a task is least sensitive to."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from talos_fast.errors import TalosError
from talos_fast.fingerprint import fingerprint
from talos_fast.forward import Batches, Forward
from talos_fast.mask import Mask, resolve_density
from talos_fast.sensitivity.engine import sensitivities
from talos_fast.sensitivity.estimators import Estimator, check_estimator
from talos_fast.sensitivity.selection import maskable_parameters, patterns
from talos_fast.sensitivity.threshold import select_extreme

logger = logging.getLogger("talos_fast")


def calibrate(
    model: nn.Module,
    batches: Batches,
    *,
    density: float | None = None,
    sparsity: float | None = None,
    forward: Forward | None = None,
    estimator: Estimator = "fisher",
    rounds: int = 4,
    damage: float = 0.1,
    samples_per_input: int = 1,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Mask:
    """Selects the fraction ``density`` of the maskable entries with the lowest sensitivity (TaLoS, Algorithm 1).

    In round r of R every entry still kept is scored on all batches, and the ⌊density^(r/R) · N⌋ lowest stay; between
    rounds the rejected entries are multiplied by ``damage`` in the forward pass. The model is left bit-identical.

    Args:
        model: the pre-trained model; `talos_fast.sensitivity.maskable_parameters` chooses its maskable parameters.
        batches: ``(inputs, labels)`` or mappings with ``labels``, read once a round; about 512 inputs are enough.
        density: the fraction that trains, in (0, 1]; default 0.1.
        sparsity: 1 - density, instead of it.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        estimator: "fisher", "sampled-logprob", "sampled-logit", "jacobian" or "empirical".
        rounds: R; 1 scores once.
        damage: what rejected entries are multiplied by: 1 none, 0 removes them.
        samples_per_input: probes an input that share a forward; more inputs are better than more probes.
        include, exclude: shell patterns of parameter names.
        seed: of the probes.
        progress: bars on a terminal.

    Returns:
        The mask; ``mask.info`` says how it was made.

    Raises:
        TalosError: density or rounds out of range, nothing maskable, no batch, NaN or infinite logits.
    """
    fraction = resolve_density(density, sparsity)
    check_estimator(estimator)
    if rounds < 1:
        raise TalosError(f"rounds={rounds}: at least one is needed")
    if not 0.0 <= damage <= 1.0:
        raise TalosError(
            f"damage={damage}: rejected entries are multiplied by a number from 0 (removed) to 1 (untouched)"
        )
    include, exclude = patterns(include), patterns(exclude)
    parameters = maskable_parameters(model, include, exclude)
    total = sum(p.numel() for p in parameters.values())
    if iter(batches) is batches and rounds > 1:
        batches = list(batches)  # an iterator can be read once, the rounds read it again
    base, start = fingerprint(model), time.perf_counter()
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    with restored(parameters) as originals:
        for number in range(1, rounds + 1):
            scores = sensitivities(
                model, batches, forward=forward, estimator=estimator, include=include, exclude=exclude,
                samples_per_input=samples_per_input, seed=seed + number, progress=progress,
            )  # fmt: skip
            for name, score in scores.items():
                score.masked_fill_(~kept[name], float("inf"))
            kept = select_extreme(scores, max(1, int(fraction ** (number / rounds) * total)))
            logger.info("round %d of %d: %.4f of %d entries kept", number, rounds, fraction ** (number / rounds), total)
            _damage(parameters, originals, kept, damage)
    info = {
        "selection": "talos", "density": fraction, "estimator": estimator, "rounds": rounds, "damage": damage,
        "samples_per_input": samples_per_input, "seed": seed, "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip
    return Mask(kept, base=base, info=info)


@contextmanager
def restored(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Gives a copy of the parameters, and brings back their very bits, whatever happened to them."""
    originals = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield originals
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(originals[name])


@torch.no_grad()
def _damage(
    parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor], kept: Mapping[str, Tensor], factor: float
) -> None:
    # From the originals: an entry rejected two rounds ago is damaged once, not twice.
    for name, p in parameters.items():
        p.copy_(torch.where(kept[name], originals[name], originals[name] * factor))
