"""How long and how fast a run trains, what its loss sees, and what makes it another run than that of a checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from talos_fast import Mask, TalosError, finetune
from talos_fast.recipe import checked_recipe


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches() -> list:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(6)]


def test_every_step_has_its_own_learning_rate():
    rates = []
    with register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])):
        finetune(net(), batches(), method="nonlinear", steps=4, warmup=2, lr=1.0, progress=False)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("steps, warmup", [(9, 0), (25, 2), (5000, 500), (9000, 500)])
def test_the_warm_up_is_a_tenth_of_a_run_and_500_steps_at_most(steps, warmup, logged, caplog):
    def refuse(model, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finetune(net(), batches(), method="nonlinear", steps=steps, forward=refuse, progress=False)
    assert f"{steps} steps" in caplog.text and f"after a warm-up of {warmup}," in caplog.text


@pytest.mark.parametrize("steps, warmup", [(4, 4), (2, 4), (20, 0)])
def test_a_warm_up_that_is_asked_for_is_kept(steps, warmup):
    recipe = checked_recipe([], None, steps, 1.0, warmup, "constant", None, 1, "off", 0)
    expected = [(step + 1) / warmup if step < warmup else 1.0 for step in range(steps)]
    assert [recipe.lr_at(step) for step in range(steps)] == expected


@pytest.mark.parametrize("epochs, accumulate, steps", [(1, 4, 1), (2, 4, 3), (3, 6, 3), (2, 5, 2)])
def test_steps_go_on_from_one_epoch_into_the_next(epochs, accumulate, steps):
    vector = finetune(net(), batches(), method="nonlinear", epochs=epochs, accumulate=accumulate, progress=False)
    assert vector.info["steps"] == steps


def test_the_loss_of_a_float64_model_sees_float64():
    seen = []

    def loss(logits, labels):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    given = [(x.double(), y) for x, y in batches()[:1]]
    finetune(net().double(), given, method="nonlinear", loss=loss, progress=False)
    assert seen == [torch.float64]


def test_a_finetuned_vector_of_another_base_is_refused():
    vector, other = finetune(net(), batches(), method="nonlinear", steps=2, lr=1e-2, progress=False), net()
    other[0].weight.data.add_(1)
    with pytest.raises(TalosError, match="finetuned= belongs to another base"):
        finetune(other, batches(), method="lota", finetuned=vector, progress=False)


def third(which: int) -> Mask:
    return Mask({"0.weight": torch.arange(96).view(16, 6) % 3 == which})


@pytest.mark.parametrize("first, second, said", [
    ({"weight_decay": 0.1}, {"weight_decay": 0.2}, "weight_decay=0.1, this one has weight_decay=0.2"),
    ({"method": "nonlinear"}, {"method": "linearized"}, "method='nonlinear', this one has method='linearized'"),
    ({"mask": third(0), "method": "talos"}, {"mask": third(1), "method": "talos"}, "a run with mask="),
], ids=["weight decay", "method", "mask"])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(first, second, said, tmp_path):
    options = {"method": "nonlinear", "steps": 2, "lr": 1e-3, "checkpoint_dir": tmp_path, "progress": False}
    finetune(net(), batches(), **options | first)
    with pytest.raises(TalosError, match=said):
        finetune(net(), batches(), **options | second)
