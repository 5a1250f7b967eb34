"""The mask: selection rules, algebra, files, and its refusals."""

import pytest
import torch
from torch import nn

from talos_fast import Mask, TalosError
from talos_fast.fingerprint import fingerprint


@pytest.fixture
def scores() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.rand(20, 10), "b.weight": torch.rand(30) + 1.0, "c": torch.rand(())}


def test_global_scope_keeps_the_lowest_everywhere(scores):
    mask = Mask.from_scores(scores, density=0.25)
    assert mask.selected == int(0.25 * 231)
    assert not mask["b.weight"].any()
    assert scores["a.weight"][mask["a.weight"]].max() < scores["a.weight"][~mask["a.weight"]].min()


def test_highest_and_per_tensor(scores):
    highest = Mask.from_scores(scores, density=0.1, keep="highest")
    assert highest.counts()["b.weight"] == 23
    each = Mask.from_scores(scores, density=0.5, scope="per_tensor")
    assert each.counts() == {"a.weight": 100, "b.weight": 15, "c": 1}


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_a_tensor_without_entries_selects_nothing(scope):
    mask = Mask.from_scores({"w": torch.rand(4), "none": torch.zeros(0, 3)}, density=0.5, scope=scope)
    assert mask.counts() == {"w": 2, "none": 0} and mask["none"].shape == (0, 3)


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_no_scores_make_no_mask(scope):
    with pytest.raises(TalosError, match="calibrate at least one parameter"):
        Mask.from_scores({}, 0.1, scope=scope)


def test_a_selection_says_how_it_was_made(scores):
    mask = Mask.from_scores(scores, sparsity=0.75, scope="per_tensor", keep="highest", info={"task": "x"})
    assert mask.info == {"density": 0.25, "scope": "per_tensor", "keep": "highest", "task": "x"}


def test_sparsity_is_the_other_word_for_it(scores):
    assert Mask.from_scores(scores, sparsity=0.75) == Mask.from_scores(scores, density=0.25)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_a_density_outside_its_range(scores, density):
    with pytest.raises(TalosError, match=r"density=.*must be in \(0, 1\]"):
        Mask.from_scores(scores, density=density)


@pytest.mark.parametrize("option", ["scope", "keep"])
def test_refuses_an_unknown_choice(scores, option):
    with pytest.raises(TalosError, match=f"{option}='x': choose"):
        Mask.from_scores(scores, **{option: "x"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.0])
def test_refuses_what_is_no_sparsity(scores, value):
    with pytest.raises(TalosError, match=r"sparsity=.*: the fraction of entries that stays must be in \[0, 1\)"):
        Mask.from_scores(scores, sparsity=value)


@pytest.mark.parametrize("density, count", [(0.29, 29), (0.57, 57), (0.005, 1), (1.0, 100)])
def test_a_share_is_that_of_the_number_as_it_is_written(density, count):
    assert Mask.from_scores({"w": torch.arange(100.0)}, density=density).selected == count
    assert Mask.from_scores({"w": torch.arange(1000.0)}, sparsity=0.9).selected == 100


def test_refuses_density_and_sparsity_together(scores):
    with pytest.raises(TalosError, match="give one of them"):
        Mask.from_scores(scores, density=0.1, sparsity=0.9)


def test_overlap_is_the_jaccard_index():
    first = Mask({"a": torch.tensor([True, True, False]), "b": torch.tensor([True])})
    second = Mask({"a": torch.tensor([True, False, True]), "c": torch.tensor([False])})
    assert first.overlap(second) == {"a": 1 / 3, "b": 0.0, "c": 1.0, "total": 1 / 4}


def test_masks_of_other_names_are_other_masks():
    mask = Mask({"a": torch.tensor([True, False])})
    more, renamed = Mask({**mask, "b": torch.tensor([True])}), Mask({"b": mask["a"]})
    assert mask != more and more != mask and mask != renamed
    assert len({one.digest() for one in (mask, more, renamed)}) == 3


def test_freeze_leaves_only_what_has_selected_entries():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mask = Mask({"0.weight": torch.eye(3).bool(), "0.bias": torch.zeros(3, dtype=torch.bool)})
    assert mask.freeze(model) == ["0.weight"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight"]


@pytest.mark.parametrize("name, shape, message", [
    ("x.weight", (3, 3), "'x.weight', which is no parameter"),
    ("0.weight", (3, 2), r"'0.weight': the mask has shape \(3, 2\)"),
])  # fmt: skip
def test_check_names_what_does_not_fit(name, shape, message):
    with pytest.raises(TalosError, match=message):
        Mask({name: torch.ones(shape, dtype=torch.bool)}).check(nn.Sequential(nn.Linear(3, 3)))


def test_refuses_masks_that_are_not_bool():
    with pytest.raises(TalosError, match="'w' is torch.float32"):
        Mask({"w": torch.ones(3)})


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_file_round_trip(tmp_path, density):
    model = nn.Linear(40, 50)
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    mask = Mask.from_scores(scores, density=density, base=fingerprint(model), info={"task": "ü"})
    path = tmp_path / "folder" / "mask.safetensors"
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded == mask
    assert (loaded.base, loaded.info) == (mask.base, mask.info)
    assert path.stat().st_size < 1200 + mask.numel / 8
