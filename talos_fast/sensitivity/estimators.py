"""What is differentiated: each estimator is a linear probe a(x) of the logits, constant under differentiation.

With f(x) in R^K the logits, p = softmax f(x) and g = aᵀ f(x), the sensitivity is the mean over probes of (∂g/∂θ_j)²,
summed over the inputs. Differentiating log p(y|x) equals probing with e_y - p, so one backward of g serves every
estimator.
"""

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


def _signs(logits: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
    return signs.to(logits.device, logits.dtype)


def probe(
    estimator: Estimator, logits: Tensor, labels: Tensor, sampled: Tensor | None, generator: torch.Generator
) -> Tensor:
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
        generator: on the CPU, so that probes do not depend on the device.
    """
    p = logits.detach().softmax(-1)
    if estimator == "jacobian":
        return _signs(p, generator)
    if estimator == "fisher":
        root = p.sqrt() * _signs(p, generator)
        return root - p * root.sum(-1, keepdim=True)
    if estimator == "empirical":
        y = labels
    elif sampled is not None:
        y = sampled
    else:
        y = torch.multinomial(p.float().cpu(), 1, generator=generator)[:, 0]
    chosen = one_hot(y.to(p.device), p.shape[1]).to(p.dtype)
    return chosen if estimator == "sampled-logit" else chosen - p
