"""The parameters of the models in the paper's tables, by name and shape, and masks for them; no model is built."""

from collections.abc import Iterator

import torch
from torch import Tensor

from talos_fast.structure import parts

# Queries and keys in a real TaLoS mask of 10 %: ImageNet ViT-tiny, CIFAR-10, 4 rounds, damage 0.1.
QUERY_DENSITY, KEY_DENSITY = 0.656, 0.578
DENSITY = 0.1

Shapes = dict[str, tuple[int, ...]]
Masks = dict[str, Tensor]


def vit(width: int, layers: int, patch: int, tokens: int, output: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The vision tower of an open_clip ViT."""
    yield "class_embedding", (width,)
    yield "positional_embedding", (tokens, width)
    yield "proj", (width, output)
    yield "conv1.weight", (width, 3, patch, patch)
    for name in ("ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias"):
        yield name, (width,)
    for layer in range(layers):
        block = f"resblocks.{layer}"
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield f"{block}.attn.out_proj.weight", (width, width)
        yield f"{block}.mlp.c_fc.weight", (4 * width, width)
        yield f"{block}.mlp.c_fc.bias", (4 * width,)
        yield f"{block}.mlp.c_proj.weight", (width, 4 * width)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.out_proj.bias", "mlp.c_proj.bias"):
            yield f"{block}.{name}", (width,)


def t5(width: int, layers: int, heads: int, hidden: int, words: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """An encoder-decoder T5 (v1.0: ReLU, one embedding for everything) of ``layers`` layers a side."""
    yield "shared.weight", (words, width)
    for side, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for layer in range(layers):
            for part, kind in enumerate(kinds):
                block = f"{side}.block.{layer}.layer.{part}"
                for name in "qkvo":
                    yield f"{block}.{kind}.{name}.weight", (width, width)
                if layer == part == 0:
                    yield f"{block}.{kind}.relative_attention_bias.weight", (32, heads)
                yield f"{block}.layer_norm.weight", (width,)
            block = f"{side}.block.{layer}.layer.{len(kinds)}"
            yield f"{block}.DenseReluDense.wi.weight", (hidden, width)
            yield f"{block}.DenseReluDense.wo.weight", (width, hidden)
            yield f"{block}.layer_norm.weight", (width,)
        yield f"{side}.final_layer_norm.weight", (width,)


MODELS: dict[str, Shapes] = {
    "ViT-B-32": dict(vit(768, 12, 32, 50, 512)),
    "ViT-L-14": dict(vit(1024, 24, 14, 257, 768)),
    "T5-Large": dict(t5(1024, 24, 16, 4096, 32128)),
    "smoke": dict(vit(64, 2, 8, 17, 32)),
    "smoke-T5": dict(t5(64, 2, 4, 128, 100)),
}


def talos_mask(shapes: Shapes, generator: torch.Generator) -> Masks:
    """Queries and keys at the densities of real masks, scattered within them; nothing else."""
    density = {"query": QUERY_DENSITY, "key": KEY_DENSITY}
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for name, mask in masks.items():
        for part in parts(name, tuple(mask.shape)):
            if part.kind in density:
                entries = part.of(mask)
                entries.copy_(torch.rand(entries.shape, generator=generator) < density[part.kind])
    return masks


def random_mask(shapes: Shapes, generator: torch.Generator, density: float = DENSITY) -> Masks:
    """Every entry with the same probability."""
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}


def lota_mask(shapes: Shapes, generator: torch.Generator, density: float = DENSITY) -> Masks:
    """The largest entries of a made-up change of all weights, with one threshold over the model.

    The change of an entry is normal, times a log-normal factor of its tensor (σ = 1) and one of its row (σ = 0.7):
    layers and output features move by different amounts in a fine-tuning, entries within them are scattered. So some
    tensors and rows are nearly full and others empty. The threshold is that of a sample of about 2^20 entries.
    """
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    scales, sample = {}, []
    for name, shape in shapes.items():
        scales[name] = torch.exp(torch.randn(1, generator=generator) + 0.7 * torch.randn(shape[0], generator=generator))
        rows = torch.randint(shape[0], (1 + 2**20 * torch.Size(shape).numel() // total,), generator=generator)
        sample.append(scales[name][rows] * torch.randn(len(rows), generator=generator).abs())
    changes = torch.cat(sample)
    threshold = changes.kthvalue(round((1 - density) * len(changes))).values
    return {
        name: torch.randn(shape, generator=generator).abs_()
        > (threshold / scales[name]).view(-1, *[1] * len(shape[1:]))
        for name, shape in shapes.items()
    }


MASKS = {"TaLoS mask": talos_mask, "10 % random": random_mask, "LoTA-like 10 %": lota_mask}
