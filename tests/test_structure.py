"""What kind of entry a parameter name stands for, and the plots drawn from it."""

import pytest
import torch

from talos_fast.plots import plot_mask
from talos_fast.structure import density_by_kind, density_by_part, parts


@pytest.mark.parametrize("name, shape, kinds", [
    ("encoder.transformer.resblocks.3.attn.in_proj_weight", (6, 2), ["query", "key", "value"]),
    ("encoder.transformer.resblocks.3.attn.in_proj_bias", (6,), ["bias"] * 3),
    ("encoder.transformer.resblocks.3.attn.out_proj.weight", (2, 2), ["attention output"]),
    ("encoder.transformer.resblocks.3.mlp.c_fc.weight", (2, 2), ["mlp"]),
    ("encoder.transformer.resblocks.3.ln_1.weight", (2,), ["norm"]),
    ("blocks.3.attn.qkv.weight", (6, 2), ["query", "key", "value"]),
    ("blocks.3.attn.proj.weight", (2, 2), ["attention output"]),
    ("blocks.3.mlp.fc1.weight", (2, 2), ["mlp"]),
    ("blocks.3.norm1.bias", (2,), ["norm"]),
    ("encoder.encoder.layer.3.attention.self.query.weight", (2, 2), ["query"]),
    ("encoder.encoder.layer.3.attention.self.key.bias", (2,), ["bias"]),
    ("encoder.encoder.layer.3.attention.output.dense.weight", (2, 2), ["attention output"]),
    ("encoder.encoder.layer.3.attention.output.LayerNorm.weight", (2,), ["norm"]),
    ("encoder.encoder.layer.3.intermediate.dense.weight", (2, 2), ["mlp"]),
    ("encoder.encoder.layer.3.output.dense.weight", (2, 2), ["mlp"]),
    ("encoder.decoder.block.3.layer.1.EncDecAttention.k.weight", (2, 2), ["key"]),
    ("encoder.decoder.block.3.layer.1.EncDecAttention.o.weight", (2, 2), ["attention output"]),
    ("encoder.encoder.block.3.layer.1.DenseReluDense.wi_0.weight", (2, 2), ["mlp"]),
    ("encoder.encoder.block.3.layer.1.layer_norm.weight", (2,), ["norm"]),
    ("encoder.conv1.weight", (2, 3, 4, 4), ["convolution"]),
    ("encoder.patch_embed.proj.weight", (2, 3, 4, 4), ["convolution"]),
    ("encoder.ln_pre.weight", (2,), ["norm"]),
    ("something", (), ["other"]),
])  # fmt: skip
def test_kinds(name, shape, kinds):
    found = parts(name, shape)
    assert [part.kind for part in found] == kinds
    assert {part.layer for part in found} == {3 if ".3." in name else -1}


def masks() -> dict[str, torch.Tensor]:
    fused = torch.zeros(6, 4, dtype=torch.bool)
    fused[:2], fused[2] = True, True
    return {f"blocks.{n}.attn.qkv.weight": fused for n in range(2)} | {
        "patch_embed.proj.weight": ~torch.zeros(2, 3, 2, 2).bool()
    }


def test_densities_split_fused_projections():
    found = {key: count.density for key, count in density_by_part(masks()).items()}
    assert found == {(-1, "convolution"): 1.0, (0, "query"): 1.0, (0, "key"): 0.5, (0, "value"): 0.0,
                     (1, "query"): 1.0, (1, "key"): 0.5, (1, "value"): 0.0}  # fmt: skip
    kinds = density_by_kind(masks())
    assert list(kinds) == ["query", "key", "value", "convolution"]
    assert (kinds["key"].selected, kinds["key"].total) == (8, 16)


def test_plots_are_pictures(tmp_path):
    from PIL import Image

    plot_mask(masks(), tmp_path / "mask.png")
    plot_mask({"w": torch.ones(3, dtype=torch.bool)}, tmp_path / "vector.svg")
    with Image.open(tmp_path / "mask.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert (tmp_path / "vector.svg").read_text().startswith("<?xml")
