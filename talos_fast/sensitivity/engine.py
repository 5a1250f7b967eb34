"""`sensitivities`: S_j = Σ_x (∂ aᵀf(x) / ∂θ_j)², per sample, from one batched forward-backward a batch."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import talos_fast.sensitivity.rules  # noqa: F401  (fills the registry)
from talos_fast.errors import TalosError
from talos_fast.forward import (
    Batch,
    Batches,
    Forward,
    checked_logits,
    default_forward,
    device_of,
    labels_of,
    take,
    to_device,
)
from talos_fast.sensitivity.capture import Capture
from talos_fast.sensitivity.estimators import Estimator, check_estimator, probe
from talos_fast.sensitivity.per_sample import add_squares, add_squares_by_loop
from talos_fast.sensitivity.selection import maskable_parameters

logger = logging.getLogger("talos_fast")


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
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Per-sample squared gradients of every maskable parameter, summed over all inputs (Iurada et al. 2025, Eq. 7).

    The model is put into evaluation mode meanwhile and left as it was found; samples of a batch must not interact.

    Args:
        model: any module.
        batches: ``(inputs, labels)`` or mappings with ``labels``; labels are (N,) int64.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        estimator: what is differentiated; see `talos_fast.sensitivity.estimators.probe`.
        labels: one (N,) tensor a batch, used instead of sampling; for tests and parity.
        include, exclude: patterns of names; see `maskable_parameters`.
        samples_per_input: R probes an input, averaged; they share one forward.
        dtype: of the scores; default fp32, fp64 for an fp64 model.
        seed: of the probes.
        progress: show a bar on a terminal.

    Returns:
        name -> tensor of the parameter's shape on its device, non-negative.

    Raises:
        TalosError: no batch, an empty one, NaN or infinite logits (the batch is named), no maskable parameter,
            or samples of a batch that interact.
    """
    check_estimator(estimator)
    if samples_per_input < 1:
        raise TalosError(f"samples_per_input={samples_per_input}: at least one probe an input is needed")
    forward = forward or default_forward
    parameters = maskable_parameters(model, include, exclude)
    scores = {name: torch.zeros_like(p, dtype=dtype or _score_dtype(p), memory_format=torch.contiguous_format)
              for name, p in parameters.items()}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    fallback: dict[str, str] = {}
    count = 0
    with evaluating(model):
        for index, batch in enumerate(tqdm(batches, "sensitivity", disable=None if progress else True, leave=False)):
            where = f"batch {index}"
            batch = to_device(batch, device)
            if index == 0:
                fallback = _verify(model, parameters, forward, batch, where)
            sampled = None if labels is None else labels[index]
            probes = _Probes(estimator, labels_of(batch, where), sampled, generator, samples_per_input)
            _add_batch(model, parameters, scores, forward, batch, probes, fallback, where)
            count += 1
    if not count:
        raise TalosError(
            "there is no batch to calibrate on; the iterable was empty (an iterator can be read only once)"
        )
    return scores


def _score_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter requiring a gradient, eager execution; all restored."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval().requires_grad_(False)
        # The fused attention of nn.MultiheadAttention is one opaque operation, and has no batching rule.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class _Probes:
    """The R probes of a batch, drawn when its logits are known."""

    def __init__(
        self, estimator: Estimator, labels: Tensor, sampled: Tensor | None, generator: torch.Generator, repeats: int
    ) -> None:
        self.repeats = repeats
        self._fixed = (estimator, labels, sampled, generator)

    def draw(self, logits: Tensor) -> Iterator[Tensor]:
        """R tensors (N, K), scaled so that squares of derivatives average over the repeats."""
        estimator, labels, sampled, generator = self._fixed
        for _ in range(self.repeats):
            yield probe(estimator, logits, labels, sampled, generator) / self.repeats**0.5


def _add_batch(
    model: nn.Module, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor], forward: Forward,
    batch: Batch, probes: _Probes, fallback: dict[str, str], where: str,
) -> None:  # fmt: skip
    """Adds one batch: captured parameters by one backward a probe, the others by `add_squares`."""
    captured = {name: p for name, p in parameters.items() if name not in fallback}
    with Capture(captured, len(labels_of(batch, where)), scores) as capture:
        logits, _ = checked_logits(forward, model, batch, where)
    drawn = list(probes.draw(logits))
    for n, coefficients in enumerate(drawn):
        if logits.requires_grad:
            capture.backward((logits * coefficients).sum(), retain_graph=n + 1 < len(drawn))
    for name, reason in capture.uncovered.items():
        if name not in fallback:
            logger.info("%s: %s; its per-sample gradients come from torch.func", name, reason)
            fallback[name] = reason
    if fallback:
        rest = {name: parameters[name] for name in fallback}
        for coefficients in drawn:
            add_squares(model, rest, {name: scores[name] for name in rest}, forward, batch, coefficients)


def _verify(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, where: str
) -> dict[str, str]:
    """Holds capture against a plain backward a sample, on two samples; gives the names on which it cannot be trusted.

    This is what makes a wrong guess about a model's layout impossible: an axis that is not the batch, a use that no
    torch function shows, recomputation in the backward. Whatever differs goes to torch.func.

    Raises:
        TalosError: the logits of a sample depend on the other one.
    """
    size = min(2, len(labels_of(batch, where)))
    pair = take(batch, 0, size, len(labels_of(batch, where)))
    captured, expected = ({name: torch.zeros_like(p, memory_format=torch.contiguous_format, dtype=_score_dtype(p))
                           for name, p in parameters.items()} for _ in range(2))  # fmt: skip
    with Capture(parameters, size, captured) as capture:
        logits, _ = checked_logits(forward, model, pair, where)
    coefficients = torch.linspace(-1.0, 1.5, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    if logits.requires_grad:
        capture.backward((logits * coefficients).sum(), retain_graph=False)
    logits = logits.detach()
    alone = add_squares_by_loop(model, parameters, expected, forward, pair, coefficients)
    tolerance = 1e-6 if logits.dtype is torch.float64 else 1e-2
    if float((alone - logits).abs().max()) > tolerance * (1 + float(logits.abs().max())):
        raise TalosError(
            f"{where}: logits change with the other samples of the batch, so there is no gradient per sample; remove "
            "what mixes samples or draws random numbers in evaluation mode"
        )
    doubtful = dict(capture.uncovered)
    scale = max(float(score.max()) for score in expected.values())
    for name, score in expected.items():
        # Scores of a tensor with a zero true gradient (attention key biases) are rounding noise on either side.
        allowed = tolerance * float(score.max()) + torch.finfo(score.dtype).eps ** 2 * scale
        if name not in doubtful and float((captured[name] - score).abs().max()) > allowed:
            doubtful[name] = "capture disagrees with a plain backward"
    for name, reason in doubtful.items():
        logger.info("%s: %s; its per-sample gradients come from torch.func", name, reason)
    return doubtful
