"""`Tangents`: forward-mode derivatives of linear maps and attention, without the products that torch wastes on them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from talos_fast.takeover import MATMUL, PRODUCTS, Takeover


@dataclass(frozen=True)
class LowRank:
    """A direction of a weight (outs, ins) that is a sum of products of factors, each on some rows.

    Args:
        shape: of the weight.
        terms: (rows, B of shape (rows, r), A of shape (r, ins)).
    """

    shape: tuple[int, ...]
    terms: tuple[tuple[slice, Tensor, Tensor], ...]

    def linear(self, input: Tensor) -> Tensor:
        """``F.linear(input, self.dense())`` through the rank: of the input only (..., r) is kept for the backward."""
        return self._placed([F.linear(F.linear(input, a), b) for _, b, a in self.terms])

    def dense(self) -> Tensor:
        """The direction itself, differentiable in its factors."""
        return self._placed([(b @ a).t() for _, b, a in self.terms]).t()

    def _placed(self, parts: list[Tensor]) -> Tensor:
        """The sum of parts (..., rows), each in its columns of (..., outs)."""
        total: Any = 0
        for (rows, *_), part in zip(self.terms, parts, strict=True):
            start = rows.start or 0
            total = total + F.pad(part, (start, self.shape[0] - start - part.shape[-1]))
        placed: Tensor = total
        return placed


Direction = Tensor | LowRank
"""Where a parameter moves: dense, of its shape, or by factors."""


# Hugging Face's code asks for gradients of activations where it checkpoints; that would record the pass of the values.
_RECORD = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]

# A checkpoint of torch 2.11 keeps its inputs in a function without forward mode. Nothing is computed from its output.
if _inputs := getattr(torch.utils.checkpoint, "_NoopSaveInputs", None):
    _inputs.jvp = staticmethod(lambda ctx, *tangents: torch.zeros(0))


class Tangents(Takeover):
    """Within it, and within a dual level, products and attention carry tangents along by formulas of our own.

    torch multiplies by the tangents of frozen weights, which are zero, and of attention it differentiates the plain
    implementation only, which computes in float32 what comes in bfloat16. Its tangents of layer norms are float32 under
    autocast where their values are bfloat16, which no product takes, and torch.compile cannot trace them.

    Args:
        moves: a parameter as the model holds it -> (it without its tangent, where it moves). What moves by factors
            has to be here, and is no dual; whatever else than F.linear uses it sees a dense one.

    Attributes:
        again: whether part of the forward is run again in the backward pass, as far as products show it.
    """

    functions = (*PRODUCTS, F.scaled_dot_product_attention, F.layer_norm, *_RECORD)

    def __init__(self, moves: Mapping[Tensor, tuple[Tensor, Direction]]) -> None:
        super().__init__()
        self.again = False
        self._moves, self._hooks = moves, _save_hooks()

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """One of the functions, on duals."""
        if func in _RECORD:
            activation: Tensor = args[0]
            return activation
        if func is not F.linear and self._concerns((*args, *kwargs.values())):
            args, kwargs = tree_map_only(Tensor, self._dense, (args, kwargs))
        if func in MATMUL:
            return self._product(func, *args, *kwargs.values())
        if func in PRODUCTS:
            return self._product(func, *args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        return _attention(*args, **kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():  # gradient checkpointing puts hooks where tensors are saved
            self.again = self.again or _save_hooks() != self._hooks
        known = func in self.functions or func is F.multi_head_attention_forward or func.__name__ == "__get__"
        if not known and self._concerns((*args, *kwargs.values())):
            args, kwargs = tree_map_only(Tensor, self._dense, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def _concerns(self, values: Iterable[Any]) -> bool:
        return any(
            self._concerns(value)
            if isinstance(value, (list, tuple))
            else isinstance(value, Tensor) and value in self._moves
            for value in values
        )

    def _dense(self, value: Tensor) -> Tensor:
        weight, direction = self._moves.get(value, (value, None))
        return make_dual(weight, direction.dense()) if isinstance(direction, LowRank) else value

    def _product(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        """What is linear in both: the product rule, without the terms that are zero."""

        def product(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
            found: Tensor = func(a, b) if func in MATMUL else func(a, b, c, *rest, **options)
            return found

        (x, dx), (w, dw) = _split(input), self._split(weight)
        b, db = self._dense_split(bias)
        output, tangent = product(x, w, b), None if dx is None else product(dx, w)
        if dw is not None:
            tangent = _sum(tangent, dw.linear(x) if isinstance(dw, LowRank) else product(x, dw))
        if db is not None:
            tangent = _sum(tangent, db.view(-1, *[1] * (w.dim() - 2)))
        return _dual(output, tangent)

    def _layer_norm(
        self, input: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """w x̂ + b, x̂ = (x - mean) / deviation; the tangent: w (ẋ - mean(ẋ) - x̂ mean(x̂ ẋ)) / deviation + ẇ x̂ + ḃ."""
        x, dx = _split(input)
        (w, dw), (b, db) = self._dense_split(weight), self._dense_split(bias)
        output: Tensor = F.layer_norm(x, shape, w, b, eps)
        if dx is None and dw is None:
            return _dual(output, db)
        over = tuple(range(-len(shape), 0))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.var(over, unbiased=False, keepdim=True) + eps).rsqrt()
        unit = (wide - wide.mean(over, keepdim=True)) * scale
        tangent = db
        if dx is not None:
            along = (dx - dx.mean(over, keepdim=True) - unit * (unit * dx).mean(over, keepdim=True)) * scale
            tangent = _sum(tangent, along if w is None else along * w)
        if dw is not None:
            tangent = _sum(tangent, unit * dw)
        return _dual(output, tangent)

    def _split(self, tensor: Tensor) -> tuple[Tensor, Direction | None]:
        return self._moves.get(tensor) or _split(tensor)

    def _dense_split(self, tensor: Tensor | None) -> tuple[Any, Tensor | None]:
        value, direction = (None, None) if tensor is None else self._split(tensor)
        return value, direction.dense() if isinstance(direction, LowRank) else direction


def _save_hooks() -> object:
    """What is called with tensors that are saved for the backward pass."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(False)


def _dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else make_dual(value, tangent.expand_as(value).to(value.dtype))


def _split(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent; what has none stays the very tensor, which `CastOnce` may know."""
    value, tangent = unpack_dual(tensor)
    return (tensor, None) if tangent is None else (value, tangent)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(s Q Kᵀ + M) V and its tangent.

    With P the softmax and Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ) + Ṁ the tangent is (P∘Ṡ) V - rowsum(P∘Ṡ) ∘ P V + P V̇: the same six
    products as torch's, but in the dtype of the inputs, and P the only thing of (T, S) numbers that is kept.
    """
    (q, dq), (k, dk), (v, dv) = map(_split, (query, key, value))
    mask, dmask = (None, None) if attn_mask is None else _split(attn_mask)
    if dropout_p or enable_gqa or (dq is None and dk is None and dv is None and dmask is None):
        with sdpa_kernel(SDPBackend.MATH) if dropout_p or enable_gqa else nullcontext():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = _probabilities((q * factor) @ k.mT, mask, is_causal)
    output = p.to(v.dtype) @ v
    slope = _sum(dq if dq is None else (dq * factor) @ k.mT, dk if dk is None else (q * factor) @ dk.mT, dmask)
    tangent = None if dv is None else p.to(v.dtype) @ dv
    if slope is not None:
        moved = p * slope
        tangent = _sum(tangent, moved.to(v.dtype) @ v, -moved.sum(-1, keepdim=True).to(v.dtype) * output)
    return _dual(output, tangent)


def _probabilities(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The softmax in float32 or wider; zero in rows of which nothing may be seen, as torch has it."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if is_causal:
        mask = torch.ones(wide.shape[-2:], dtype=torch.bool, device=wide.device).tril()
    if mask is not None:
        wide = wide.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else wide + mask
    p: Tensor = torch.ops.aten._safe_softmax(wide, -1)
    return p


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None
