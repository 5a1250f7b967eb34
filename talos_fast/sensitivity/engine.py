"""`sensitivities`: S_j = Σ_x (∂ aᵀf(x) / ∂θ_j)², per sample, from one batched forward-backward a batch."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from talos_fast.batch import Batch, Batches
from talos_fast.forward import Forward, default_forward
from talos_fast.modules import unwrapped
from talos_fast.ranks import Ranks
from talos_fast.sensitivity.estimators import Estimator
from talos_fast.sensitivity.scorer import Scorer
from talos_fast.sensitivity.selection import maskable_parameters
from talos_fast.sensitivity.uses import Precision


def sensitivities(
    model: nn.Module,
    batches: Batches,
    *,
    forward: Forward | None = None,
    estimator: Estimator = "fisher",
    labels: Sequence[Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    samples_per_input: int = 1,
    dtype: torch.dtype | None = None,
    precision: Precision = "full",
    scores_device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Per-sample squared gradients of every maskable parameter, summed over all inputs (Iurada et al. 2025, Eq. 7).

    The model is put into evaluation mode meanwhile and left as it was found; samples of a batch must not interact.
    The batch size does not change the result, and neither do probes: they are drawn for each sample of the data.
    Where torch.distributed is initialized each rank brings its own batches, and all get the sum over all ranks.
    Memory: what a forward-backward without weight gradients takes, and the scores.

    Args:
        model: any module; of DistributedDataParallel and compiled ones the module inside, whose names are used.
        batches: ``(inputs, labels)`` or mappings with ``labels``; labels are (N,) int64, and every tensor whose first
            dimension is N holds one row a sample.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        estimator: what is differentiated; see `talos_fast.sensitivity.estimators.probe`.
        labels: one (N,) int64 tensor a batch, for the estimators that sample labels, instead of those; for tests and
            parity.
        include, exclude: patterns of names; see `maskable_parameters`.
        samples_per_input: R probes an input, averaged; they share one forward.
        dtype: of the scores; default fp32, fp64 for an fp64 model.
        precision: "full" multiplies layers' inputs and gradients as the model computes them; "bf16" rounds both first
            and sums in fp32, which costs less where the machine multiplies bf16 faster and changes 0.1 % of a mask of
            10 % (a tenth of what bf16 autocast of the whole pass changes).
        scores_device: where the scores are kept; default: with their parameters.
        seed: of the probes.
        progress: show a bar on a terminal.

    Returns:
        name -> tensor of the parameter's shape, non-negative.

    Raises:
        TalosError: no batch, an empty one, NaN or infinite logits, a single logit of which there is nothing to learn,
            unfit ``labels`` (the batch is named), no maskable parameter, samples of a batch that interact, or another
            rank failed.
    """
    ranks = Ranks()
    with ranks.as_one():
        model = unwrapped(model)
        scorer = Scorer(
            model, maskable_parameters(model, include, exclude), forward or default_forward, estimator,
            samples_per_input, precision,
        )  # fmt: skip
        # Made when it is first asked for: the model has been examined by then, which takes as much memory again.
        ledger = cache(partial(scorer.ledger, dtype, scores_device))
        scorer.score(batches, lambda _: ledger(), seed, ranks, labels=labels, bar=progress_bar(progress, ranks))
        scores = {name: accumulator.values for name, accumulator in ledger().items()}
        ranks.sum(scores.values())
        return scores


def progress_bar(progress: bool, ranks: Ranks, label: str = "sensitivity") -> Callable[[Batches], Iterable[Batch]]:
    """Wraps batches in a bar, on the terminal of the first rank."""
    hidden = None if progress and ranks.rank == 0 else True
    return lambda batches: tqdm(batches, label, disable=hidden, leave=False)
