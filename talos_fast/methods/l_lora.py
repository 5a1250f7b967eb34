"""L-LoRA (Tang et al. 2024): LoRA on the query and value projections, linearized in its factors around their start."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from talos_fast.arguments import number
from talos_fast.batch import Batch
from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.linear import Linearized
from talos_fast.methods.base import Deltas, Options, Request, Setup, differences
from talos_fast.structure import parts
from talos_fast.tangents import LowRank

RANK = 16
LORA_ALPHA = 32.0
ADAPTED = ("query", "value")


@dataclass(frozen=True)
class Adapter:
    """scale · B A on some output features of a weight.

    Args:
        name: of the weight.
        rows: that it changes, along ``dim``.
        dim: of the weight, where its output features lie; if 1, as in transformers' ``Conv1D``, (B A)ᵀ is added.
        a: A0, (r, inputs); fixed.
        b: B, (rows, r); starts at zero, and trains.
    """

    name: str
    rows: slice
    dim: int
    a: Tensor
    b: nn.Parameter

    @property
    def label(self) -> str:
        """What B is called among the tensors that train."""
        return f"{self.name}[{self.rows.start}:]"


def l_lora(request: Request) -> Setup:
    """Trains the factors of W + (lora_alpha / r) B A in the first-order expansion of the model around (A0, B0 = 0).

    The derivative by A is (lora_alpha / r) B0 dA = 0, so that B alone moves the function: the expansion is the one of
    the model in the direction (lora_alpha / r) B A0 of its weights, and A stays at A0. A0 is drawn as in LoRA (Kaiming
    uniform), from the name of the weight alone: it is the same for every task, run and seed, so that B of several tasks
    add up, and the vector holds the exact dense change of each weight.

    Queries and values are told by parameter name (`talos_fast.structure`), their rows in fused projections (``qkv``,
    ``in_proj_weight``) included, which adapters on modules cannot reach.

    The released code multiplies by lora_alpha instead of lora_alpha / r, trains the base weights of the adapted
    modules, merges B of one task with A0 of another, and linearizes each adapter by itself inside a network that stays
    non-linear. Here the whole network is linear in B, as the paper's Eq. 5 has it.

    Raises:
        TalosError: no query or value projection requires a gradient, or a rank or scale that is not positive.
    """
    rank, alpha = rank_and_alpha(request.options)
    adapters = lora_adapters(request.model, rank)
    scale, parameters = alpha / rank, dict(request.model.named_parameters())
    request.model.requires_grad_(False)
    expansion = Linearized(request.model, lambda: lora_changes(adapters, parameters, scale))

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return expansion.logits(request.forward, batch)

    def export() -> Deltas:
        with torch.no_grad():
            changes = {name: change.dense() for name, change in lora_changes(adapters, parameters, scale).items()}
            deltas = differences({name: torch.zeros_like(change) for name, change in changes.items()}, changes)
            Edit(request.model, deltas).move(1.0)
        return deltas

    trained = {adapter.label: adapter.b for adapter in adapters}
    optimizer = AdamW(trained.values(), lr=request.lr, weight_decay=request.weight_decay, fused=True)
    factors = sum(b.nbytes for b in trained.values())
    info = {"linearized": True, "rank": rank, "lora_alpha": alpha, "factor_bytes": factors}
    return Setup(trained, optimizer, forward, export, around=expansion.around, info=info)


def rank_and_alpha(options: Options) -> tuple[int, float]:
    """r and lora_alpha, or their defaults.

    Raises:
        TalosError: one that is not positive, a rank that is no integer, or a scale that is no finite number.
    """
    rank = RANK if options.rank is None else options.rank
    alpha = LORA_ALPHA if options.lora_alpha is None else options.lora_alpha
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or rank < 1 or not 0 < number("lora_alpha", alpha) < math.inf:
        raise TalosError(f"rank={rank}, lora_alpha={alpha}: both must be positive, the rank an integer, alpha finite")
    return int(rank), float(alpha)


def lora_adapters(model: nn.Module, rank: int) -> list[Adapter]:
    """Adapters of all queries and values that require a gradient, A0 drawn and B zero.

    Raises:
        TalosError: there is none.
    """
    found = []
    for name, p in model.named_parameters():
        for part in parts(name, tuple(p.shape)):
            if part.kind in ADAPTED and p.dim() == 2 and p.requires_grad:
                outputs, inputs = p.shape[part.dim], p.shape[1 - part.dim]
                start, stop, _ = part.rows.indices(outputs)
                generator = torch.Generator().manual_seed(crc32(f"{name}[{start}:]".encode()))
                bound = 1 / math.sqrt(inputs)  # kaiming_uniform_(a=√5)
                a = (2 * torch.rand(rank, inputs, generator=generator, dtype=torch.float32, device="cpu") - 1) * bound
                b = nn.Parameter(p.new_zeros(stop - start, rank))
                found.append(Adapter(name, slice(start, stop), part.dim, a.to(p), b))
    if not found:
        raise TalosError(
            f"method 'l-lora' adapts queries and values, and {type(model).__name__} has none that requires a gradient "
            "and is told by its name (q_proj, query, qkv, in_proj_weight, SelfAttention.q …); use another method"
        )
    return found


def lora_changes(adapters: list[Adapter], parameters: Mapping[str, Tensor], scale: float) -> dict[str, LowRank]:
    """scale · B A0 of every adapted weight."""
    terms: dict[str, list[tuple[slice, Tensor, Tensor]]] = {}
    for adapter in adapters:
        rows, left, right = adapter.rows, scale * adapter.b, adapter.a
        if adapter.dim:
            inputs, outputs = parameters[adapter.name].shape
            padding = (rows.start, outputs - rows.stop)
            rows, left, right = slice(0, inputs), right.t(), nn.functional.pad(left.t(), padding)
        terms.setdefault(adapter.name, []).append((rows, left, right))
    return {name: LowRank(tuple(parameters[name].shape), tuple(of)) for name, of in terms.items()}
