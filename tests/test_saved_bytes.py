"""What autograd keeps for the backward pass, counted byte by byte: with a TaLoS mask only what the chain needs."""

import pytest
import torch
from methods_cases import setup_of
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

N, TOKENS, WIDTH, HEADS, LAYERS = 3, 17, 32, 2, 4
ROWS = N * TOKENS
ROW = 4 * ROWS * WIDTH  # one activation of the width of the model


class Kept:
    """Bytes of the storages that autograd keeps, parameters and the input not counted."""

    def __init__(self, known) -> None:
        self._known = {t.untyped_storage()._cdata for t in known}
        self.storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    def __enter__(self):
        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self.storages[storage._cdata] = storage.nbytes()
        return tensor


def tower():
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(16, 4, WIDTH, LAYERS, HEADS, mlp_ratio=4.0, output_dim=8).train()
    return model, torch.randn(N, 3, 16, 16)


def kept_by(method: str, blocks=range(LAYERS)) -> int:
    model, images = tower()
    if method == "talos":
        for number, block in enumerate(model.transformer.resblocks):
            block.requires_grad_(number in blocks)
    setup = setup_of(model, method)
    if method == "talos":
        for name, p in setup.trained.items():
            p.requires_grad_(int(name.split(".")[2]) in blocks)
    with Kept([*model.parameters(), images]) as kept, setup.around():
        setup.forward(model, (images, None)).sum().backward()
    return kept.bytes


def statistics(norms: int) -> int:
    """Mean and reciprocal deviation of each row of layer norms."""
    return norms * 2 * 4 * ROWS


def test_a_block_keeps_what_its_chain_needs():
    """Of a block: the inputs of both norms, of the projection to Q, K and V, these, attention's output, GELU's input.

    The difference between one block that trains and two is one block: the tail above is the same.
    """
    block = kept_by("talos", range(1, LAYERS)) - kept_by("talos", range(2, LAYERS))
    logsumexp = 4 * N * HEADS * TOKENS
    # norm, projection, Q, K and V, attention, norm, GELU
    assert block == (1 + 1 + 3 + 1 + 1 + 4) * ROW + statistics(2) + logsumexp


def test_full_fine_tuning_keeps_half_as_much_again():
    """The inputs of the output projection and of both linear maps of the MLP besides."""
    full, sparse = kept_by("nonlinear"), kept_by("talos")
    assert sparse < 0.7 * full


def test_below_the_lowest_layer_that_trains_nothing_is_kept():
    assert kept_by("talos", [LAYERS - 1]) < kept_by("talos", range(LAYERS)) / (LAYERS - 1)


@pytest.mark.parametrize("layer, expected", [
    (nn.Linear(WIDTH, 48), 0), (nn.GELU(), ROW), (nn.LayerNorm(WIDTH), ROW + 2 * 4 * ROWS), (nn.Dropout(0.0), 0),
], ids=str)  # fmt: skip
def test_a_frozen_layer_keeps_what_the_gradient_of_its_input_needs(layer, expected):
    layer.requires_grad_(False)
    x = torch.randn(ROWS, WIDTH, requires_grad=True) * 1.0
    with Kept(layer.parameters()) as kept:
        layer(x).sum().backward()
    assert kept.bytes == expected


def test_a_linear_map_that_trains_keeps_its_input_only():
    layer, x = nn.Linear(WIDTH, 48), torch.randn(ROWS, WIDTH)
    with Kept(layer.parameters()) as kept:
        F.linear(x, layer.weight, layer.bias).sum().backward()
    assert kept.bytes == ROW
