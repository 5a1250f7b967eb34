"""What the entries of a mask or vector are: queries, keys, values, …, and in which layer; told from parameter names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

OUTSIDE = "outside"
"""The layer of what is in no block."""

KINDS = ("query", "key", "value", "attention output", "mlp", "convolution", "norm", "bias", "other")

# First match wins. Fused projections hold their parts one after the other, as equal shares of the output features.
_PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"crossattention\.c_attn\.(weight|bias)$", ("key", "value")),
    (r"(in_proj_weight|in_proj_bias|\b(W?qkv|c_attn)\.(weight|bias))$", ("query", "key", "value")),
    (r"(?i:norm|\bln|_ln|layer_norm|layernorm|\bbn)[\w]*\.(weight|bias)$", ("norm",)),
    (r"\bbias$|_bias$", ("bias",)),
    (r"\b(q|q_proj|q_attn|query|query_proj|q_lin)\.weight$", ("query",)),
    (r"\b(k|k_proj|key|key_proj|k_lin)\.weight$", ("key",)),
    (r"\b(v|v_proj|value|value_proj|v_lin)\.weight$", ("value",)),
    (r"(out_proj|o_proj|(attn|attention|attnpool)\.(proj|c_proj|dense|output\.dense)|out_lin|(Self|EncDec)Attention\.o)\.weight$",
     ("attention output",)),
    (r"(mlp|DenseReluDense|intermediate|ffn|output\.dense|\bfc\d|c_fc|c_proj|lin(ear)?\d)[\w.]*weight$", ("mlp",)),
    (r"(conv\w*|patch_embed\w*\.proj\w*|patch_embedding)\.weight$", ("convolution",)),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run of output features of one parameter that is of one kind.

    Args:
        kind: one of `KINDS`; biases are "bias" whatever they belong to.
        layer: the number of the block, -1 outside the blocks.
        rows: of the parameter, along ``dim``.
        dim: where output features lie: 0, as in `torch.nn.Linear`; 1 in transformers' ``Conv1D``, whose weight is
            (in, out).
    """

    kind: str
    layer: int
    rows: slice
    dim: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the part in a tensor of the parameter's shape."""
        return tensor[(slice(None),) * self.dim + (self.rows,)] if tensor.dim() else tensor


def parts(name: str, shape: tuple[int, ...]) -> list[Part]:
    """The parts of a parameter; a fused projection has two or three, everything else one.

    GPT-2 and its relatives call the fused projection ``c_attn``, and only its shape says whether it is a ``Conv1D``:
    one side is two or three times the other. Where it is not, as with one key for all heads, the parts are not known
    and the kind is "other".
    """
    kinds = next((kinds for pattern, kinds in _PATTERNS if re.search(pattern, name)), ("other",))
    layer = _place(name)[1]
    by_shape = name.endswith("c_attn.weight") and len(shape) == 2
    dim = int(name.endswith("q_attn.weight") or (by_shape and shape[1] > shape[0]))
    if len(kinds) == 1:
        return [Part(kinds[0], layer, slice(None), dim)]
    share, rest = divmod(shape[dim], len(kinds))
    if rest or (by_shape and share != shape[1 - dim]):
        return [Part("other", layer, slice(None))]
    if len(shape) == 1:
        kinds = ("bias",) * len(kinds)
    return [Part(kind, layer, slice(n * share, (n + 1) * share), dim) for n, kind in enumerate(kinds)]


def _place(name: str) -> tuple[str, int]:
    """The stack of blocks that a parameter is in, by its name, and the number of the block; ("", -1) outside."""
    found = re.search(r"(?:\.|_layer_)(\d+)\.", f".{name}")
    return (f".{name}"[1 : found.start()], int(found[1])) if found else ("", -1)


def layers_of(names: Iterable[str]) -> dict[str, str]:
    """Parameter name -> its layer: the number of its block, with its stack's name where several have that number.

    The layers are in order: what is outside, then the stacks as they come, each block by block.
    """
    places = {name: _place(name) for name in names}
    stacks = list(dict.fromkeys(stack for stack, number in places.values() if number >= 0))
    numbers = [number for _, number in set(places.values()) if number >= 0]
    called = _shortened(stacks) if len(set(numbers)) < len(numbers) else dict.fromkeys(stacks, "")
    order = {stack: position for position, stack in enumerate(["", *stacks])}
    ordered = sorted(places.items(), key=lambda item: (item[1][1] >= 0, order[item[1][0]], item[1][1]))
    return {name: OUTSIDE if n < 0 else f"{called[stack]} {n}".strip() for name, (stack, n) in ordered}


def _shortened(stacks: Sequence[str]) -> dict[str, str]:
    """The names of stacks without what they all begin and end with."""
    short = [stack.split(".") for stack in stacks]
    for end in (0, -1):
        while all(short) and len({words[end] for words in short}) == 1:
            for words in short:
                words.pop(end)
    return {stack: ".".join(words) for stack, words in zip(stacks, short, strict=True)}


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


def density_by_part(masks: Mapping[str, Tensor]) -> dict[tuple[str, str], Count]:
    """(layer, kind) -> how many entries are selected, in the order of layers (see `layers_of`) and of `KINDS`."""
    counts: dict[tuple[str, str], Count] = {}
    layers = layers_of(masks)
    for name, layer in layers.items():
        for part in parts(name, tuple(masks[name].shape)):
            counts.setdefault((layer, part.kind), Count()).add(part.of(masks[name]))
    order = list(dict.fromkeys(layers.values()))
    return dict(sorted(counts.items(), key=lambda item: (order.index(item[0][0]), KINDS.index(item[0][1]))))


def density_by_kind(masks: Mapping[str, Tensor]) -> dict[str, Count]:
    """Kind -> how many entries are selected, in the order of `KINDS`."""
    total: dict[str, Count] = {}
    for (_, kind), count in density_by_part(masks).items():
        joined = total.setdefault(kind, Count())
        joined.selected += count.selected
        joined.total += count.total
    return dict(sorted(total.items(), key=lambda item: KINDS.index(item[0])))
