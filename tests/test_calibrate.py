"""calibrate: the rounds, the damage, and what it leaves behind."""

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import interrupting
from torch import nn
from torch.utils.data import DataLoader
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, TalosError, calibrate
from talos_fast.sensitivity import sensitivities
from talos_fast.sensitivity.scorer import wanted_rows
from talos_fast.sensitivity.uses import Accumulator


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


def attention_net() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Linear(6, 16), layer, nn.Flatten(), nn.Linear(48, 3)).eval()


def sequences(samples: int = 24, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(4)
    x, y = torch.randn(samples, 3, 6), torch.randint(0, 3, (samples,))
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_cannot_be_selected_any_more_are_left_out(dtype, monkeypatch):
    """Rejected rows are dropped before the operator; the mask is the one of the full computation."""
    net, data = attention_net().to(dtype), [(x.to(dtype), y) for x, y in sequences()]
    sizes, full = [], []

    def watched(kept):
        rows = wanted_rows(kept)
        sizes.append(kept.shape[0] if rows is None else len(rows))
        full.append(kept.shape[0])
        return None if full[-1] and all_rows else rows

    monkeypatch.setattr("talos_fast.sensitivity.scorer.wanted_rows", watched)
    all_rows = False
    some = calibrate(net, data, density=0.05, stability=False, progress=False)
    assert 0 < sum(sizes) < 0.8 * sum(full)
    all_rows = True
    assert some == calibrate(net, data, density=0.05, stability=False, progress=False)


def test_the_batch_size_does_not_change_the_mask():
    net, exact = attention_net(), attention_net().double()
    masks = [calibrate(net, sequences(24, size), progress=False) for size in (24, 8, 5, 1)]
    assert all(masks[0].overlap(mask)["total"] >= 0.999 for mask in masks[1:])
    doubled = [[(x.double(), y) for x, y in sequences(24, size)] for size in (24, 5)]
    assert calibrate(exact, doubled[0], progress=False) == calibrate(exact, doubled[1], progress=False)


def test_stability_is_the_agreement_of_the_halves():
    """In one round it is the agreement of two masks that the halves give alone; more data raises it."""
    net, data = attention_net(), sequences(48, 8)
    mask = calibrate(net, data, rounds=1, estimator="empirical", progress=False)
    halves = [calibrate(net, data[n::2], rounds=1, estimator="empirical", progress=False) for n in (0, 1)]
    assert mask.info["stability"] == pytest.approx(halves[0].overlap(halves[1])["total"], abs=1e-4)
    assert mask.info["samples"] == 48 and mask.info["seconds"] > 0
    whole = calibrate(net, data, progress=False)
    assert 0.1 < whole.info["stability"] < 1
    assert calibrate(net, data[:1], progress=False).info["stability"] is None
    apart = calibrate(net, data, stability=False, progress=False)
    assert apart.info["stability"] is None and apart.overlap(whole)["total"] > 0.999


@pytest.mark.parametrize("rounds", [1, 3])
def test_stability_of_a_sample_of_rows_is_near_that_of_all(monkeypatch, rounds):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 3))
    whole = calibrate(net, batches(), rounds=rounds, progress=False)
    monkeypatch.setattr("talos_fast.stability.WATCHED", 130_000)
    some = calibrate(net, batches(), rounds=rounds, progress=False)
    assert some == whole, "what is watched does not change the mask"
    assert some.info["stability"] != whole.info["stability"]
    assert some.info["stability"] == pytest.approx(whole.info["stability"], abs=0.05)


def test_scores_are_held_once(monkeypatch):
    """Following the halves makes no second set of sums."""
    made = []
    zeros = Accumulator.zeros
    monkeypatch.setattr(Accumulator, "zeros", lambda *a, **k: made.append(1) or zeros(*a, **k))
    net, counts = attention_net(), []
    for stability in (False, True):
        made.clear()
        calibrate(net, sequences(), rounds=1, stability=stability, progress=False)
        counts.append(len(made))
    assert counts[0] == counts[1] > 0


def test_bf16_products_change_a_thousandth_of_the_mask():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    full, rounded = (calibrate(net, batches(), precision=p, progress=False) for p in ("full", "bf16"))
    assert 0.98 < full.overlap(rounded)["total"] < 1
    assert rounded.info["precision"] == "bf16"
    with pytest.raises(TalosError, match="precision='fp8': choose 'full' or 'bf16'"):
        calibrate(net, batches(), precision="fp8", progress=False)


def test_sensitivities_that_are_all_zero_are_refused_and_many_zeros_named(caplog):
    net = model()
    nn.init.zeros_(net[4].weight)
    with pytest.raises(TalosError, match="all sensitivities are zero: the logits do not depend"):
        calibrate(net, batches(), exclude="4.*", progress=False)
    caplog.clear()
    net = model()
    nn.init.constant_(net[0].bias, -100.0)  # GELU gives zero, and so does its derivative
    calibrate(net, batches(), density=0.5, rounds=1, progress=False)
    assert "no sensitivity at all in 3 tensors, such as 0.weight, 0.bias, 2.weight: the forward seems" in caplog.text
    caplog.clear()
    net = model()
    nn.init.constant_(net[0].bias[:19], -100.0)
    zeros = 19 * (6 + 1 + 20)
    calibrate(net, batches(), density=0.5, rounds=1, progress=False)
    assert f"{zeros} sensitivities are exactly zero, and the mask takes 311" in caplog.text
    caplog.clear()
    calibrate(net, batches(), density=0.95, rounds=1, progress=False)
    assert not caplog.records


class Interrupting(list):
    """Batches that press Ctrl-C while one of them is read."""

    def __init__(self, content, at) -> None:
        super().__init__(content)
        self.at, self.read = at, 0

    def __iter__(self):
        for batch in list.__iter__(self):
            self.read += 1
            if self.read == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


# With a checkpoint the first batch is read twice more, to know the data by it.
@pytest.mark.parametrize("at", [3, 7, 14])
def test_an_interrupted_run_goes_on_and_gives_the_same_mask(tmp_path, at):
    net, data = attention_net(), sequences()
    before = [p.clone() for p in net.parameters()]
    straight = calibrate(net, data, progress=False)
    pressed = Interrupting(data, at)
    with pytest.raises(KeyboardInterrupt):
        calibrate(net, pressed, checkpoint_dir=tmp_path, progress=False)
    assert pressed.read == at, "the running batch is finished, no other is begun"
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    rest = Interrupting(data, -1)
    resumed = calibrate(net, rest, checkpoint_dir=tmp_path, progress=False)
    assert resumed == straight and resumed.info["stability"] == straight.info["stability"]
    assert rest.read == 2 + 12 - (at - 3) // 3 * 3, "complete rounds are not repeated"
    again = Interrupting(data, -1)
    assert calibrate(net, again, checkpoint_dir=tmp_path, progress=False) == straight and again.read == 2
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    net = attention_net()
    calibrate(net, sequences(), rounds=1, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(TalosError, match="of a run with seed=0, this one has seed=1; use another checkpoint_dir"):
        calibrate(net, sequences(), rounds=1, checkpoint_dir=tmp_path, seed=1, progress=False)
    with pytest.raises(TalosError, match=r"of a run with exclude=None, this one has exclude=\['0.\*'\]"):
        calibrate(net, sequences(), rounds=1, checkpoint_dir=tmp_path, exclude="0.*", progress=False)
    fresh = calibrate(net, sequences(), rounds=1, checkpoint_dir=tmp_path, seed=1, resume=False, progress=False)
    assert fresh == calibrate(net, sequences(), rounds=1, seed=1, progress=False)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    """With the same labels, such as two data sets sorted by class have."""
    net, data = attention_net(), sequences()
    calibrate(net, data, rounds=1, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(TalosError, match="other batches: other data, another batch size, or another order; use"):
        calibrate(net, [(-x, y) for x, y in data], rounds=1, checkpoint_dir=tmp_path, progress=False)


@pytest.mark.parametrize("own_generator", [False, True])
def test_shuffled_batches_come_in_one_order_and_leave_the_generators_as_they_were(tmp_path, own_generator):
    net, generator = attention_net(), torch.Generator().manual_seed(3) if own_generator else None
    examples = [(x, y) for inputs, labels in sequences() for x, y in zip(inputs, labels, strict=True)]
    loader = DataLoader(examples, batch_size=8, shuffle=True, generator=generator)
    with pytest.raises(KeyboardInterrupt):
        calibrate(net, loader, forward=interrupting(9), checkpoint_dir=tmp_path, progress=False)
    own = None if generator is None else generator.get_state()
    straight = calibrate(net, loader, progress=False)
    torch.rand(3)
    resumed = calibrate(net, loader, checkpoint_dir=tmp_path, progress=False)
    assert resumed == straight and resumed.info["stability"] == straight.info["stability"]
    assert generator is None or torch.equal(generator.get_state(), own)


def test_scores_can_wait_on_another_device():
    """The meta device stands for a second one: what would be added there is computed here."""
    from talos_fast.sensitivity.uses import Accumulator, Outer

    into = Accumulator.zeros(torch.zeros(3, 2), torch.float32, torch.device("meta"))
    into.add_outer(Outer(torch.randn(2, 4, 2), torch.randn(2, 4, 3)), "full")
    assert into.values.device.type == "meta"
    found = sensitivities(attention_net(), sequences(), estimator="empirical", scores_device="cpu")
    assert all(score.device.type == "cpu" for score in found.values())


def on_rank(rank: int, folder: Path) -> None:
    """One of two processes: its samples are those that a DistributedSampler would deal it."""
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(attention_net().double())
    mine = [(x[rank::2].double(), y[rank::2]) for x, y in sequences()]
    mask = calibrate(net, mine, checkpoint_dir=f"{folder}/rounds", progress=False)
    mask.save(f"{folder}/mask{rank}.safetensors")
    short = mine[:1] if rank else []
    calibrate(net, short, rounds=2, progress=False).save(f"{folder}/short{rank}.safetensors")
    broken = [(x * float("nan") if rank else x, y) for x, y in mine]
    with pytest.raises(TalosError, match="logits hold NaN" if rank else "another rank failed"):
        calibrate(net, broken, progress=False)
    unread = (1 // (1 - rank) and batch for batch in mine)
    with pytest.raises(ZeroDivisionError if rank else TalosError, match="by zero|another rank failed"):
        calibrate(net, unread, progress=False)
    place = f"{folder}/mask0.safetensors" if rank == 0 else f"{folder}/elsewhere"  # no folder on the first rank
    with pytest.raises(TalosError, match="another rank failed" if rank else "cannot be written"):
        calibrate(net, mine, checkpoint_dir=place, progress=False)
    kept = {"checkpoint_dir": None if rank else f"{folder}/only"}
    for options in ({"density": 0.1 + 0.1 * rank}, {"rounds": 1 + rank}, kept):
        with pytest.raises(TalosError, match="the ranks were given different weights or options"):
            calibrate(net, mine, progress=False, **options)


@needs_gloo
def test_two_ranks_give_the_mask_of_one(tmp_path):
    """In float64: sums in another order round differently, so in fp32 entries at the threshold may change places."""
    on_two_ranks(on_rank, tmp_path)
    torch.manual_seed(0)
    alone = calibrate(attention_net().double(), [(x.double(), y) for x, y in sequences()], progress=False)
    first, second = (Mask.load(tmp_path / f"mask{rank}.safetensors") for rank in (0, 1))
    assert first == second == alone and first.base == alone.base
    assert first.info["samples"] == alone.info["samples"] == 24
    assert Mask.load(tmp_path / "short0.safetensors") == Mask.load(tmp_path / "short1.safetensors")


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
    ({"rounds": 2.5}, "rounds=2.5: must be an integer"),
    ({"damage": 2}, "damage=2"),
    ({"samples_per_input": 0}, "samples_per_input=0"),
    ({"include": ["x*"]}, "'x\\*' matches no parameter"),
])  # fmt: skip
def test_bad_arguments_are_named(options, message):
    with pytest.raises(TalosError, match=message):
        calibrate(model(), batches(), progress=False, **options)
