"""The parameters of the models in the paper's tables, by name and shape, and masks for them; no model is built."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Queries and keys in a real TaLoS mask of 10 %: ImageNet ViT-tiny, CIFAR-10, 4 rounds, damage 0.1.
QUERY_DENSITY, KEY_DENSITY = 0.656, 0.578


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


MODELS = {
    "ViT-B-32": dict(vit(768, 12, 32, 50, 512)),
    "ViT-L-14": dict(vit(1024, 24, 14, 257, 768)),
    "smoke": dict(vit(64, 2, 8, 17, 32)),
}


def talos_mask(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """Queries and keys at the densities of real masks, scattered within them; nothing else."""
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for name, mask in masks.items():
        if name.endswith("in_proj_weight"):
            third = mask.shape[0] // 3
            for start, density in ((0, QUERY_DENSITY), (third, KEY_DENSITY)):
                mask[start : start + third] = torch.rand(third, mask.shape[1], generator=generator) < density
    return masks


def random_mask(shapes: dict[str, tuple[int, ...]], generator: torch.Generator, density: float) -> dict[str, Tensor]:
    """Every entry with the same probability."""
    return {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
