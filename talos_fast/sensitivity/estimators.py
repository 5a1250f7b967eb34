"""What is differentiated: each estimator is a linear probe a(x) of the logits, constant under differentiation.

With f(x) in R^K the logits, p = softmax f(x) and g = aᵀ f(x), the sensitivity is the mean over probes of (∂g/∂θ_j)²,
summed over the inputs. Differentiating log p(y|x) equals probing with e_y - p, so one backward of g serves every
estimator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from talos_fast.errors import TalosError

Estimator = Literal["fisher", "sampled-logprob", "sampled-logit", "jacobian", "empirical"]


def check_estimator(name: str) -> None:
    """Raises `TalosError` for an unknown name."""
    if name not in get_args(Estimator):
        raise TalosError(f"estimator={name!r}: choose one of {', '.join(get_args(Estimator))}")


def injected(estimator: Estimator, labels: Sequence[Tensor] | None, index: int, where: str) -> Tensor | None:
    """The injected labels of a batch; raises `TalosError` if the estimator samples none, or this batch has none."""
    if labels is None:
        return None
    if estimator not in ("sampled-logprob", "sampled-logit"):
        raise TalosError(f"labels= replace sampled labels, but estimator={estimator!r} samples none")
    if index >= len(labels):
        raise TalosError(f"{where}: labels= holds one tensor a batch, but only {len(labels)}")
    return labels[index]


def check_probed(estimator: Estimator, logits: Tensor, sampled: Tensor | None, where: str) -> None:
    """Raises `TalosError`, naming the batch, for logits (N, K) or injected labels that cannot be probed."""
    samples, classes = logits.shape
    if classes == 1 and estimator not in ("jacobian", "sampled-logit"):
        raise TalosError(
            f"{where}: a single logit a sample has probability 1 whatever it is, so estimator={estimator!r} would give "
            "0 everywhere; pass two logits from forward=, such as torch.cat([-z, z], 1) / 2, or estimator='jacobian'"
        )
    if sampled is None:
        return
    if sampled.shape != (samples,) or sampled.dtype is not torch.int64:
        raise TalosError(
            f"{where}: labels= must be ({samples},) int64, but is {tuple(sampled.shape)} of {sampled.dtype}"
        )
    low, high = int(sampled.min()), int(sampled.max())
    if low < 0 or high >= classes:
        raise TalosError(f"{where}: labels= {low} … {high}, but the model has {classes} classes, 0 … {classes - 1}")


@dataclass(frozen=True)
class Draws:
    """Random numbers that belong to samples: the same ones however the data is batched, split, or where it is scored.

    Args:
        seed: of everything.
        samples: position in the data of each of the N samples.
        repeat: number of the probe.
    """

    seed: int
    samples: Sequence[int]
    repeat: int = 0

    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(_mix(self.seed, sample, self.repeat)) for sample in self.samples]

    def signs(self, width: int) -> Tensor:
        """±1, (N, width), fp32."""
        bits = [torch.randint(0, 2, (width,), generator=generator, device="cpu") for generator in self._generators()]
        return torch.stack(bits).mul_(2).sub_(1).float()

    def uniform(self) -> Tensor:
        """Uniform in [0, 1), (N, 1), fp64."""
        return torch.stack([torch.rand(1, dtype=torch.float64, generator=g, device="cpu") for g in self._generators()])


def _mix(*numbers: int) -> int:
    """One well-spread 63-bit seed (the finalizer of splitmix64, number by number)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def probe(estimator: Estimator, logits: Tensor, labels: Tensor, sampled: Tensor | None, draws: Draws) -> Tensor:
    """The coefficients a, (N, K), like ``logits``.

    * ``fisher``: a = √p⊙ε - p⟨√p, ε⟩, ε = ±1. E[aaᵀ] = diag(p) - ppᵀ, so E[g'²] is the diagonal Fisher information
      Σ_y p_y (∂ log p_y)², with less variance than sampling y.
    * ``sampled-logprob``: e_y - p with y drawn from p: the same expectation, as in the TaLoS paper (Eq. 7).
    * ``sampled-logit``: e_y with y drawn from p: the raw logit, as in the paper's released vision code.
    * ``jacobian``: ±1, so E[g'²] = Σ_k (∂f_k)².
    * ``empirical``: e_y - p with y the batch's own label.

    Args:
        logits: (N, K).
        labels: (N,), the batch's own.
        sampled: (N,), used instead of drawing y; for tests and parity.
        draws: made on the CPU, so that probes do not depend on the device.
    """
    p = logits.detach().softmax(-1)
    if estimator == "jacobian":
        return draws.signs(p.shape[1]).to(p)
    if estimator == "fisher":
        root = p.sqrt() * draws.signs(p.shape[1]).to(p)
        return root - p * root.sum(-1, keepdim=True)
    if estimator == "empirical":
        y = labels
    elif sampled is not None:
        y = sampled
    else:
        # The inverse of the distribution function, scaled to its last value, which rounding may leave below 1.
        cumulative = p.double().cpu().cumsum(-1)
        y = (cumulative <= draws.uniform() * cumulative[:, -1:]).sum(-1)
    chosen = one_hot(y.to(p.device), p.shape[1]).to(p.dtype)
    return chosen if estimator == "sampled-logit" else chosen - p
