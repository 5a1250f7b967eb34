"""What kind of entry a parameter name stands for, and the plots drawn from it."""

import re

import pytest
import torch

from talos_fast import TalosError
from talos_fast.plots import masks as pictures
from talos_fast.plots import plot_mask
from talos_fast.plots.figure import require_picture
from talos_fast.structure import density_by_kind, density_by_part, layers_of, parts


@pytest.mark.parametrize("name, shape, kinds", [
    ("encoder.transformer.resblocks.3.attn.in_proj_weight", (6, 2), ["query", "key", "value"]),
    ("encoder.transformer.resblocks.3.attn.in_proj_bias", (6,), ["bias"] * 3),
    ("encoder.transformer.resblocks.3.attn.out_proj.weight", (2, 2), ["attention output"]),
    ("encoder.layers.encoder_layer_3.self_attention.in_proj_weight", (6, 2), ["query", "key", "value"]),
    ("encoder.layers.encoder_layer_3.mlp.0.weight", (2, 2), ["mlp"]),
    ("layers.3.attn.Wqkv.weight", (6, 2), ["query", "key", "value"]),
    ("encoder.layer.3.attention.self.value_proj.weight", (2, 2), ["value"]),
    ("model.layers.3.self_attn.o_proj.weight", (2, 2), ["attention output"]),
    ("gpt_neox.layers.3.attention.dense.weight", (2, 2), ["attention output"]),
    ("visual.attnpool.c_proj.weight", (2, 2), ["attention output"]),
    ("layers.3.linear1.weight", (2, 2), ["mlp"]),
    ("embeddings.patch_embedding.weight", (2, 2, 1, 1), ["convolution"]),
    ("layer1.3.bn1.weight", (2,), ["norm"]),
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
    ("transformer.h.3.attn.c_attn.weight", (6, 2), ["query", "key", "value"]),
    ("transformer.h.3.attn.c_attn.weight", (4, 2), ["other"]),
    ("transformer.h.3.attn.c_attn.weight", (9, 2), ["other"]),
    ("blocks.3.attn.qkv.weight", (7, 2), ["other"]),
    ("transformer.layer.3.ffn.lin1.weight", (2, 2), ["mlp"]),
    ("something.fc1.weight", (2, 2), ["mlp"]),
    ("encoder.conv1.weight", (2, 3, 4, 4), ["convolution"]),
    ("encoder.patch_embed.proj.weight", (2, 3, 4, 4), ["convolution"]),
    ("encoder.ln_pre.weight", (2,), ["norm"]),
    ("something", (), ["other"]),
])  # fmt: skip
def test_kinds(name, shape, kinds):
    found = parts(name, shape)
    assert [part.kind for part in found] == kinds
    assert {part.layer for part in found} == {3 if re.search(r"[._]3\.", name) else -1}


@pytest.mark.parametrize("cross", [False, True])
def test_the_parts_of_gpt2_are_the_queries_keys_and_values_that_it_computes(cross):
    """One part at a time is doubled; of what the projection gives, that third (or half) doubles and no other."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=12, n_layer=4, n_head=2, add_cross_attention=True)
    block = GPT2Model(config).h[3]
    attention = block.crossattention if cross else block.attn
    module, kinds = attention.c_attn, ["key", "value"] if cross else ["query", "key", "value"]
    name = f"h.3.{'crossattention' if cross else 'attn'}.c_attn.weight"
    found = parts(name, tuple(module.weight.shape))
    assert [(part.kind, part.layer) for part in found] == [(kind, 3) for kind in kinds]
    x = torch.randn(2, 5, 12)
    before = module(x).split(attention.split_size, dim=2)
    for place, part in enumerate(found):
        with torch.no_grad():
            part.of(module.weight).mul_(2)
            after = module(x).split(attention.split_size, dim=2)
            part.of(module.weight).mul_(0.5)
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            torch.testing.assert_close(new, (2 if number == place else 1) * old)
    names = dict(block.named_parameters())
    (output,) = parts("h.3.crossattention.c_proj.weight", tuple(names["crossattention.c_proj.weight"].shape))
    (query,) = parts("h.3.crossattention.q_attn.weight", tuple(names["crossattention.q_attn.weight"].shape))
    assert (output.kind, query.kind, query.dim) == ("attention output", "query", 1)


def masks() -> dict[str, torch.Tensor]:
    fused = torch.zeros(6, 4, dtype=torch.bool)
    fused[:2], fused[2] = True, True
    return {f"blocks.{n}.attn.qkv.weight": fused for n in range(2)} | {
        "patch_embed.proj.weight": ~torch.zeros(2, 3, 2, 2).bool()
    }


def test_densities_split_fused_projections():
    found = {key: count.density for key, count in density_by_part(masks()).items()}
    assert found == {("outside", "convolution"): 1.0, ("0", "query"): 1.0, ("0", "key"): 0.5, ("0", "value"): 0.0,
                     ("1", "query"): 1.0, ("1", "key"): 0.5, ("1", "value"): 0.0}  # fmt: skip
    kinds = density_by_kind(masks())
    assert list(kinds) == ["query", "key", "value", "convolution"]
    assert (kinds["key"].selected, kinds["key"].total) == (8, 16)


def test_densities_of_single_and_of_no_entries_come_in_the_order_of_kinds():
    found = density_by_part({"0.mlp.weight": torch.zeros(0, 3).bool(), "0.q.weight": torch.tensor(True)})
    assert [(*key, count.density) for key, count in found.items()] == [("0", "query", 1.0), ("0", "mlp", 0.0)]


@pytest.mark.parametrize(("names", "layers"), [
    (["t.encoder.block.{}.a.weight", "t.decoder.block.{}.b.weight", "t.shared.weight"],
     ["outside", "encoder 0", "encoder 1", "encoder 10", "decoder 0", "decoder 1", "decoder 10"]),
    (["transformer.resblocks.{}.a", "visual.transformer.resblocks.{}.a"],
     ["0", "1", "10", "visual 0", "visual 1", "visual 10"]),
    (["blocks.{}.a", "head.bias"], ["outside", "0", "1", "10"]),
    (["{}.weight"], ["0", "1", "10"]),
])  # fmt: skip
def test_blocks_of_two_stacks_with_one_number_are_two_layers(names, layers):
    found = layers_of([name.format(n) for name in names for n in (0, 10, 1)])
    assert list(dict.fromkeys(found.values())) == layers
    assert found.keys() == {name.format(n) for name in names for n in (0, 10, 1)}


def test_plots_are_pictures(tmp_path):
    from PIL import Image

    plot_mask(masks(), tmp_path / "mask.png")
    plot_mask({"w": torch.ones(3, dtype=torch.bool)}, tmp_path / "vector.svg")
    with Image.open(tmp_path / "mask.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert (tmp_path / "vector.svg").read_text().startswith("<?xml")
    with pytest.raises(TalosError, match="nothing to draw"):
        plot_mask({}, tmp_path / "none.png")
    with pytest.raises(TalosError, match=r"mask.xyz: pictures are .png, .pdf or .svg"):
        plot_mask(masks(), tmp_path / "mask.xyz")
    with pytest.raises(TalosError, match="mask.xyz: pictures are"):
        require_picture(tmp_path / "mask.xyz", "--plot")


@pytest.mark.parametrize("name", ["mask", "mask.PNG"])
def test_a_picture_without_an_ending_or_with_a_loud_one_is_a_png(tmp_path, name):
    plot_mask({"w": torch.ones(3) > 0}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_block_is_drawn_without_its_namesakes_and_titles_are_no_formulas(tmp_path):
    """T5's blocks all hold a ``layer.0``, which is no block 0."""
    from PIL import Image

    sizes = []
    for blocks in (1, 6):
        names = [f"encoder.block.{b}.layer.{s}.SelfAttention.q.weight" for b in range(blocks) for s in range(2)]
        found = {name: torch.full((4, 4), ".block.0." in name) for name in names}
        plot_mask(found, tmp_path / "mask.png", title="US$_1_$")
        with Image.open(tmp_path / "mask.png") as image:
            sizes.append(image.size)
    assert sizes[0] == sizes[1]


def test_stacks_that_count_on_are_one_row_of_layers():
    """As where one numbers the blocks of all stages; their names are left out."""
    assert list(layers_of(["stage1.0.a", "stage1.0.b", "stage2.1.a"]).values()) == ["0", "0", "1"]


def test_the_fullest_block_is_drawn_matrix_by_matrix(monkeypatch):
    """What is outside of the blocks has more entries, and a bias is no matrix."""
    figures, fused = [], torch.zeros(6, 4, dtype=torch.bool)
    fused[:2] = True
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    block = {"qkv.weight": ~fused, "qkv.bias": torch.ones(6) > 0, "conv.weight": torch.ones(2, 3, 2, 2) > 0}
    found = {"stem.conv.weight": torch.ones(9, 3, 4, 4) > 0, "blocks.0.qkv.weight": fused}
    plot_mask(found | {f"blocks.1.{name}": mask for name, mask in block.items()}, "mask.png")
    plot_mask({"w": torch.ones(3, 3) > 0}, "mask.png")
    assert [figure.get_suptitle() for figure in figures] == [
        "mask structure; below: the weights of block 1", "mask structure",
    ]  # fmt: skip
    drawn = {axis.get_title().split("\n")[0]: axis.images[0] for axis in figures[0].axes if axis.images}
    assert {name: image.get_array().shape for name, image in drawn.items()} == {
        "qkv.weight": (6, 4), "conv.weight": (2, 12), "fraction that trains, by layer": (5, 3),
    }  # fmt: skip
    assert all(image.get_clim() == (0, 1) for image in drawn.values())
    assert drawn["fraction that trains, by layer"].get_array()[0].tolist() == [None, 1.0, 0.0]
