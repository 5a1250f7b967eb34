"""Frozen heads: everything that differs between tasks, in buffers, so that task vectors share their names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from talos_fast.errors import TalosError


class CosineHead(nn.Module):
    """Logits from the angle between features and one direction a class.

    Equivalent to `scale * normalize(features, dim=-1) @ normalize(directions, dim=-1).T`.

    Args:
        directions: one a class, shape (K, D), any length; for CLIP the embeddings of the class prompts.
        scale: the inverse temperature, exp(logit_scale) of CLIP.

    Raises:
        TalosError: directions of another shape, not finite, or zero.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, directions: Tensor, scale: float) -> None:
        super().__init__()
        if directions.ndim != 2 or not directions.norm(dim=-1).isfinite().all() or not directions.any(dim=-1).all():
            raise TalosError(
                f"directions: found shape {tuple(directions.shape)} with a zero or non-finite row, or not two axes; "
                "give one finite, non-zero direction a class, shape (K, D)"
            )
        self.register_buffer("weight", functional.normalize(directions.detach(), dim=-1).T.contiguous())
        self.register_buffer("scale", torch.tensor(scale, dtype=directions.dtype, device=directions.device))

    def forward(self, features: Tensor) -> Tensor:
        """Features of shape (N, D) to logits of shape (N, K)."""
        return self.scale * (functional.normalize(features, dim=-1) @ self.weight)


class ChoiceHead(nn.Module):
    """The answer choices of a text-to-text task, as token ids.

    Args:
        choice_ids: one choice a row, end-of-sequence token included, filled up with `pad_id`; int64, shape (K, T).
        pad_id: the padding token, which no choice contains.
    """

    choice_ids: Tensor

    def __init__(self, choice_ids: Tensor, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.register_buffer("choice_ids", choice_ids.long())

    def forward(self, logits: Tensor, choice_ids: Tensor) -> Tensor:
        """Sum of the log-probabilities of each choice's tokens, not divided by their number.

        Args:
            logits: of the decoder, shape (N, K, T, V).
            choice_ids: the tokens that these logits predict, shape (N, K, T).

        Returns:
            Scores of shape (N, K), float32 or wider.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(-1, choice_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
        return chosen.masked_fill(choice_ids == self.pad_id, 0.0).sum(dim=-1)
