"""calibrate: the rounds, the damage, and what it leaves behind."""

import pytest
import torch
from torch import nn

from talos_fast import Mask, TalosError, calibrate
from talos_fast.sensitivity import sensitivities


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(3)]


def test_one_round_is_the_lowest_scores():
    net = model()
    mask = calibrate(net, batches(), density=0.2, rounds=1, estimator="empirical", progress=False)
    assert mask == Mask.from_scores(sensitivities(net, batches(), estimator="empirical"), density=0.2)


@pytest.mark.parametrize("damage", [0.0, 0.1, 1.0])
def test_rounds_follow_the_definition(damage):
    """Two rounds by hand: score, keep ⌊√density N⌋, damage the rest, score again, keep ⌊density N⌋ of those."""
    net = model()
    found = calibrate(net, batches(), density=0.25, rounds=2, damage=damage, estimator="empirical", progress=False)
    total = sum(p.numel() for p in net.parameters())
    first = sensitivities(net, batches(), estimator="empirical")
    order = torch.cat([s.reshape(-1) for s in first.values()]).argsort(stable=True)
    rejected = order[int(0.25**0.5 * total) :]
    damaged = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    damaged[rejected] *= damage
    nn.utils.vector_to_parameters(damaged, net.parameters())
    second = torch.cat([s.reshape(-1) for s in sensitivities(net, batches(), estimator="empirical").values()])
    second[rejected] = float("inf")
    expected = torch.zeros(total, dtype=torch.bool)
    expected[second.argsort(stable=True)[: int(0.25 * total)]] = True
    assert torch.equal(torch.cat([m.reshape(-1) for m in found.values()]), expected)


def test_the_model_is_bit_identical_even_after_an_error():
    net = model().bfloat16()
    before = [p.clone() for p in net.parameters()]
    data = [(x.bfloat16(), y) for x, y in batches()]
    calibrate(net, data, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        return model(batch[0]) * (float("nan") if calls > 10 else 1)

    with pytest.raises(TalosError, match="the logits hold NaN"):
        calibrate(net, data, forward=failing, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_an_iterator_serves_all_rounds_and_seeds_repeat():
    net = model()
    assert calibrate(net, iter(batches()), progress=False) == calibrate(net, batches(), progress=False)
    assert calibrate(net, batches(), seed=1, progress=False) != calibrate(net, batches(), progress=False)


def test_info_says_how():
    mask = calibrate(model(), batches(), sparsity=0.9, progress=False)
    assert mask.density == pytest.approx(0.1, abs=2e-3)
    assert (
        mask.info["estimator"] == "fisher" and mask.info["rounds"] == 4 and mask.info["density"] == pytest.approx(0.1)
    )
    assert len(mask.base) == 6


@pytest.mark.parametrize("options, message", [
    ({"density": 0}, "density=0.0"),
    ({"density": 0.1, "sparsity": 0.9}, "give one of them"),
    ({"rounds": 0}, "rounds=0"),
    ({"damage": 2}, "damage=2"),
    ({"samples_per_input": 0}, "samples_per_input=0"),
    ({"include": ["x*"]}, "'x\\*' matches no parameter"),
])  # fmt: skip
def test_bad_arguments_are_named(options, message):
    with pytest.raises(TalosError, match=message):
        calibrate(model(), batches(), progress=False, **options)
