"""torch's default device and dtype are the user's: what the library makes for itself does not follow them."""

import copy

import pytest
import torch
from torch import nn

import talos_fast as talos
from talos_fast.disentanglement import disentanglement_error
from talos_fast.evaluate import evaluate_along
from talos_fast.interference import interference
from talos_fast.localization import accuracy_matrix, activation_matrix
from talos_fast.merging import METHODS as MERGING
from talos_fast.methods import METHODS

OPTIONS = {
    "ties": {"density": 0.5}, "dare": {"density": 0.5}, "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
}  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, generator=generator), torch.arange(6) % 3) for _ in range(2)]


def everything(start: nn.Module, data: list, folder) -> dict[str, object]:
    """What each verb gives, as something that can be compared."""
    mask = talos.calibrate(copy.deepcopy(start), data, density=0.3, progress=False)
    mask.save(folder / "mask.safetensors")
    found: dict[str, object] = {"mask": talos.Mask.load(folder / "mask.safetensors"), "info": mask.info["stability"]}
    vectors = {}
    for method in METHODS:
        of_mask = {"mask": mask} if method == "talos" else {}
        trained = copy.deepcopy(start)
        vectors[method] = talos.finetune(trained, data, method=method, steps=3, lr=1e-2, progress=False, **of_mask)
    vectors["talos"].save_pretrained(folder)
    found |= vectors | {"loaded": talos.TaskVector.from_pretrained(folder)}
    pair = [vectors["talos"], vectors["nonlinear"]]
    for method in MERGING:
        found[f"merge {method}"] = talos.merge(start, pair, method=method, **OPTIONS.get(method, {})).state_dict()
    found["overlap"], found["interference"] = pair[0].overlap(pair[1]), interference(pair).cosine

    def ask(model: nn.Module) -> torch.Tensor:
        return model(data[0][0]).argmax(-1)

    found["disentanglement"] = disentanglement_error(start, tuple(pair), (ask, ask), [0.0, 0.7])
    found["accuracies"] = accuracy_matrix(start, pair, [lambda model: (ask(model) == data[0][1]).double().mean()])
    found["activations"] = activation_matrix(pair, [(start, data)])
    found["along"] = [accuracy.correct for accuracy in evaluate_along(start, vectors["linearized"], data, [0.3, 0.35])]
    return found


def same(one: object, other: object) -> bool:
    if isinstance(one, talos.TaskVector):
        return one.deltas.keys() == other.deltas.keys() and same(one.to_dense(), other.to_dense())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and one.device == other.device and torch.equal(one, other)
    return one == other


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return everything(model(), batches(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_nothing(dtype, expected, tmp_path):
    start, data = model(), batches()
    torch.set_default_dtype(dtype)
    try:
        found = everything(start, data, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [name for name in expected if not same(expected[name], found[name])] == []


def test_a_default_device_changes_nothing(expected, tmp_path):
    """The meta device stands for a GPU: what is made there by mistake cannot be computed with."""
    start, data = model(), batches()
    with torch.device("meta"):
        found = everything(start, data, tmp_path)
    assert [name for name in expected if not same(expected[name], found[name])] == []
