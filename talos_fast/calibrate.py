"""`calibrate`: find the entries that a task is least sensitive to."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talos_fast.arguments import checked_seed, number, require_integer, resolve_density, share
from talos_fast.batch import Batches
from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest, fingerprint
from talos_fast.forward import Forward, default_forward
from talos_fast.interrupt import interruptible
from talos_fast.mask import Mask
from talos_fast.modules import device_of, unwrapped
from talos_fast.random_state import repeatable
from talos_fast.ranks import Ranks
from talos_fast.restoring import restoring_parameters
from talos_fast.rounds import Flags, RoundFile, Survivors, data_digest
from talos_fast.sensitivity.engine import progress_bar
from talos_fast.sensitivity.estimators import Estimator
from talos_fast.sensitivity.scorer import Ledger, Scorer
from talos_fast.sensitivity.selection import maskable_parameters, patterns
from talos_fast.sensitivity.threshold import select_extreme
from talos_fast.sensitivity.uses import Precision
from talos_fast.stability import Halves

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
    precision: Precision = "full",
    scores_device: torch.device | str | None = None,
    stability: bool = True,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Mask:
    """Selects the fraction ``density`` of the maskable entries with the lowest sensitivity (TaLoS, Algorithm 1).

    In round r of R every entry still kept is scored on all batches, and the ⌊density^(r/R) · N⌋ lowest stay; between
    rounds the rejected entries are multiplied by ``damage`` in the forward pass. The model is left bit-identical.

    Ctrl-C, or SIGTERM, stops after the running batch; with ``checkpoint_dir`` the same call goes on after the last
    complete round and gives the very mask of a run that was not interrupted. Where torch.distributed is initialized
    every rank brings its own batches, dealt as `torch.utils.data.DistributedSampler` deals them, and all get the same
    mask.

    Memory beside the model and its activations, per maskable entry: 4 bytes of scores, 1 byte of mask, and a copy of
    the parameters on the CPU (none if ``rounds`` or ``damage`` is 1). ``scores_device="cpu"`` takes the scores off a
    GPU.

    Args:
        model: the pre-trained model; `talos_fast.sensitivity.maskable_parameters` chooses its maskable parameters.
        batches: ``(inputs, labels)`` or mappings with ``labels``, read once per round and in the same order each time:
            torch's generators, a loader's own too, start over. About 512 inputs are enough.
        density: the fraction that trains, in (0, 1]; default 0.1, the paper's. At 0.3 three small models learned 2 to 9
            points more and added as well or better (benchmarks/README.md), but MLPs train too, which costs time.
        sparsity: 1 - density, instead of it.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        estimator: "fisher", "sampled-logprob", "sampled-logit", "jacobian" or "empirical".
        rounds: R; 1 scores once.
        damage: what rejected entries are multiplied by: 1 none, 0 removes them.
        samples_per_input: probes per input, which share a forward; more inputs are better than more probes.
        include, exclude: shell patterns of parameter names.
        precision: "full" or "bf16", of the products of inputs and gradients; see `sensitivities`.
        scores_device: where the scores are kept; default: with their parameters.
        stability: report how well masks made from the even and from the odd batches agree.
        checkpoint_dir: where complete rounds are kept. Other batches than theirs are refused, by the first one.
        resume: take up a round that is there.
        seed: of the probes, and of the order of batches that are shuffled.
        progress: bars on a terminal.

    Returns:
        The mask. ``mask.info`` says how it was made: ``seconds``, ``samples`` (per round, over all ranks), and
        ``stability``: the Jaccard index of the masks that the even and the odd batches would select, None for a single
        batch. Both halves see the model as the joint mask damaged it, so with several rounds the index is higher than
        that of two separate runs (on the demo's tasks by 0.1 to 0.18). More samples raise both.

    Raises:
        TalosError: density, rounds or seed out of range, nothing maskable, no batch, NaN or infinite logits,
            sensitivities that are all zero, a checkpoint of another run, or another rank failed.
    """
    ranks = Ranks()
    with ranks.as_one():
        start = time.perf_counter()
        fraction = resolve_density(density, sparsity)
        damage = _checked(rounds, damage)
        seed = checked_seed("seed", seed)
        include, exclude = patterns(include), patterns(exclude)
        model = unwrapped(model)
        parameters = maskable_parameters(model, include, exclude)
        scorer = Scorer(model, parameters, forward or default_forward, estimator, samples_per_input, precision)
        total = sum(p.numel() for p in parameters.values())
        one_pass = isinstance(batches, Iterator) and (rounds > 1 or checkpoint_dir is not None)
        batches = list(batches) if one_pass else batches  # every round reads them again
        base = fingerprint(model)
        recipe: dict[str, Any] = {
            "selection": "talos", "density": fraction, "estimator": estimator, "rounds": rounds, "damage": damage,
            "samples_per_input": samples_per_input, "precision": precision, "seed": seed,
        }  # fmt: skip
        identity = {**recipe, "include": include, "exclude": exclude, "stability": stability, "base": digest(base)}
        ranks.require_same(identity | {"checkpoint_dir": checkpoint_dir is not None}, "weights or options")
        moved = parameters if rounds > 1 and damage != 1.0 else {}
        with (
            repeatable(batches, seed, device_of(model)) as batches,
            restoring_parameters(moved),
            interruptible() as interrupted,
        ):
            if checkpoint_dir is not None:
                identity["data"] = data_digest(batches, ranks)
            file = RoundFile(checkpoint_dir, identity, resume)
            state = file.load(parameters, ranks) or Survivors.all(parameters, stability)
            _damage(parameters, {name: ~kept for name, kept in state.kept.items()}, damage)
            while state.round < rounds:
                number = state.round + 1
                count = max(1, share(fraction ** (number / rounds), total))
                scores = _RoundScores(scorer, state, scores_device)
                bar = progress_bar(progress, ranks, f"calibrate, round {number} of {rounds}")
                samples = scorer.score(batches, scores.begin_batch, seed + number, ranks, bar=bar, stop=interrupted)
                chosen, halves = scores.lowest(count, ranks)
                logger.info("round %d of %d: %d of %d entries kept", number, rounds, count, total)
                if number < rounds:
                    _damage(parameters, {name: old & ~chosen[name] for name, old in state.kept.items()}, damage)
                spent = state.seconds + time.perf_counter() - start
                state, start = Survivors(chosen, halves, state.rows, number, spent, samples), time.perf_counter()
                file.save(state, ranks)
        report = {"seconds": round(state.seconds, 3), "samples": state.samples, "stability": state.stability}
        return Mask(state.kept, base=base, info=recipe | report)


def _checked(rounds: int, damage: float) -> float:
    """The damage, as Python's own number."""
    require_integer("rounds", rounds, 1)
    damage = number("damage", damage)
    if not 0.0 <= damage <= 1.0:
        raise TalosError(
            f"damage={damage}: rejected entries are multiplied by a number from 0 (removed) to 1 (untouched)"
        )
    return damage


class _RoundScores:
    """The scores of one round, and those of the watched rows by halves of the data."""

    def __init__(self, scorer: Scorer, state: Survivors, device: torch.device | str | None) -> None:
        self._scorer, self._state, self._device = scorer, state, device
        self._ledger: Ledger = {}
        self._halves: Halves | None = None
        self._batches = 0

    def begin_batch(self, index: int) -> Ledger:
        """Where the squares of a batch go."""
        if not self._ledger:
            self._ledger = self._scorer.ledger(None, self._device, self._state.alive())
            if self._state.halves:
                self._halves = Halves(self._ledger, self._state.rows, self._state.halves[0])
        if self._halves is not None:
            self._halves.turn(index)
        self._batches = index + 1
        return self._ledger

    def lowest(self, count: int, ranks: Ranks) -> tuple[Flags, list[Flags]]:
        """The next masks: the ``count`` lowest entries of all, and as large a part of the watched rows by each half."""
        batches = self._batches
        # The batch that never comes: ends the last one, and allocates on a rank without data.
        ledger = self.begin_batch(batches)
        followed = self._halves.sums if self._halves is not None and ranks.most(batches) > 1 else []
        for scores in followed:
            ranks.sum(scores.values())
        ranks.sum(accumulator.values for accumulator in ledger.values())
        halves = [
            _lowest(scores, kept, max(1, round(count * _numel(kept) / _numel(self._state.kept))))
            for scores, kept in zip(followed, self._state.halves, strict=False)
        ]
        scores = {name: accumulator.values for name, accumulator in ledger.items()}
        inside = {name: accumulator.wanted(self._state.kept[name]) for name, accumulator in ledger.items()}
        _check_zeros(scores, inside, count, self._state.round == 0)
        chosen = {name: torch.zeros_like(mask) for name, mask in self._state.kept.items()}
        for name, selected in _lowest(scores, inside, count).items():
            rows, mask = ledger[name].rows, chosen[name]
            mask[... if rows is None else rows.to(mask.device)] = selected.to(mask.device)
        return chosen, halves


def _numel(masks: Flags) -> int:
    return sum(mask.numel() for mask in masks.values())


def _check_zeros(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int, first: bool) -> None:
    """Refuses scores that say nothing, and warns of what is selected for other reasons than low sensitivity."""
    zeros = {name: int(((score == 0) & kept[name]).sum()) for name, score in scores.items()}
    total = sum(zeros.values())
    if first and total == sum(int(mask.sum()) for mask in kept.values()):
        raise TalosError(
            "all sensitivities are zero: the logits do not depend on the maskable parameters, or are so sure of one "
            "class that gradients vanish; check the head and the inputs, or choose estimator='jacobian'"
        )
    unused = [name for name, number in zeros.items() if number == scores[name].numel()]
    if first and unused:
        logger.warning(
            "no sensitivity at all in %d tensors, such as %s: the forward seems not to use them, and the mask takes "
            "them first; leave them out with exclude=", len(unused), ", ".join(unused[:3])
        )  # fmt: skip
    elif total > count:
        logger.warning(
            "%d sensitivities are exactly zero, and the mask takes %d: the order of the parameters chooses among them",
            total, count
        )  # fmt: skip


def _lowest(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int) -> Flags:
    """Which entries of ``kept`` have the ``count`` lowest scores."""
    competing = {name: score if bool(kept[name].all()) else score[kept[name]] for name, score in scores.items()}
    chosen = select_extreme(competing, count)
    return {name: torch.zeros_like(mask).masked_scatter_(mask, chosen[name]) for name, mask in kept.items()}


@torch.no_grad()
def _damage(parameters: Mapping[str, Tensor], rejected: Mapping[str, Tensor], factor: float) -> None:
    """Multiplies the entries that have just been rejected: each is damaged once, whenever it was rejected."""
    if factor != 1.0:
        for name, p in parameters.items():
            p.copy_(torch.where(rejected[name], p * factor, p))
