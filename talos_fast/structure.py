"""What the entries of a mask or vector are: queries, keys, values, …, and in which layer; told from parameter names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

KINDS = ("query", "key", "value", "attention output", "mlp", "convolution", "norm", "bias", "other")

# First match wins. Fused projections hold queries, keys and values as thirds of their rows.
_PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(in_proj_weight|in_proj_bias|\bqkv\.(weight|bias)|c_attn\.(weight|bias))$", ("query", "key", "value")),
    (r"(?i:norm|\bln|_ln|layer_norm|layernorm)[\w]*\.(weight|bias)$", ("norm",)),
    (r"\bbias$|_bias$", ("bias",)),
    (r"\b(q|q_proj|query|q_lin)\.weight$", ("query",)),
    (r"\b(k|k_proj|key|k_lin)\.weight$", ("key",)),
    (r"\b(v|v_proj|value|v_lin)\.weight$", ("value",)),
    (r"(out_proj|attn\.proj|attention\.output\.dense|out_lin|(Self|EncDec)Attention\.o|attn\.c_proj)\.weight$",
     ("attention output",)),
    (r"(mlp|DenseReluDense|intermediate|ffn|output\.dense|\bfc\d|c_fc|c_proj|lin\d)[\w.]*weight$", ("mlp",)),
    (r"(conv\w*|patch_embed\w*\.proj\w*)\.weight$", ("convolution",)),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run of rows of one parameter that is of one kind.

    Args:
        kind: one of `KINDS`; biases are "bias" whatever they belong to.
        layer: the number of the block, -1 outside the blocks.
        rows: of the parameter's first dimension.
    """

    kind: str
    layer: int
    rows: slice


def parts(name: str, shape: tuple[int, ...]) -> list[Part]:
    """The parts of a parameter; a fused projection has three, everything else one."""
    kinds = next((kinds for pattern, kinds in _PATTERNS if re.search(pattern, name)), ("other",))
    numbers = re.findall(r"\.(\d+)\.", f".{name}")
    layer = int(numbers[0]) if numbers else -1
    if len(kinds) == 3 and shape[0] % 3 == 0:
        third = shape[0] // 3
        kinds = ("bias",) * 3 if len(shape) == 1 else kinds
        return [Part(kind, layer, slice(n * third, (n + 1) * third)) for n, kind in enumerate(kinds)]
    return [Part(kinds[0] if len(kinds) == 1 else "other", layer, slice(None))]


@dataclass
class Count:
    """Selected entries of all entries."""

    selected: int = 0
    total: int = 0

    @property
    def density(self) -> float:
        """selected / total."""
        return self.selected / self.total if self.total else 0.0

    def add(self, mask: Tensor) -> None:
        """Counts one more bool tensor."""
        self.selected += int(mask.sum())
        self.total += mask.numel()


def density_by_part(masks: Mapping[str, Tensor]) -> dict[tuple[int, str], Count]:
    """(layer, kind) -> how many entries are selected, in the order of layers and of `KINDS`."""
    counts: dict[tuple[int, str], Count] = {}
    for name, mask in masks.items():
        for part in parts(name, tuple(mask.shape)):
            rows = mask if mask.dim() == 0 else mask[part.rows]
            counts.setdefault((part.layer, part.kind), Count()).add(rows)
    return dict(sorted(counts.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1]))))


def density_by_kind(masks: Mapping[str, Tensor]) -> dict[str, Count]:
    """Kind -> how many entries are selected, in the order of `KINDS`."""
    total: dict[str, Count] = {}
    for (_, kind), count in density_by_part(masks).items():
        joined = total.setdefault(kind, Count())
        joined.selected += count.selected
        joined.total += count.total
    return dict(sorted(total.items(), key=lambda item: KINDS.index(item[0])))
