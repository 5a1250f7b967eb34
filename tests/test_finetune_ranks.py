"""`finetune` over the ranks of torch.distributed: two processes train as one on all of their samples."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, TalosError, TaskVector, finetune, ranks, train
from talos_fast.checkpoint import FILE
from talos_fast.ranks import Ranks

RUNS = {
    "talos": {}, "nonlinear": {}, "lota": {"density": 0.3}, "linearized": {}, "l-lora": {"rank": 2},
    "talos, accumulated": {"accumulate": 2, "steps": 5}, "talos, released": {"compat": "released"},
    "nonlinear, not clipped": {"clip": None},
}  # fmt: skip


class Net(nn.Module):
    """With a query and a value for L-LoRA, a channels_last weight, and dropout where asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(16, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(1)
        return self.head(self.dropout(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


class Forgetful(Net):
    """Does not use its queries on the second rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if dist.get_rank() == 0 else self.head(self.v_proj(self.conv(x).flatten(1)))


def examples() -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 3, 4, 4, generator=generator, dtype=torch.float64)
    return [(x, int(x.sum() > 0) + int(x.sum() > 3)) for x in inputs]


def batches(rank: int = 0, world: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Eight samples each, of which a rank of two has four."""
    inputs, labels = zip(*examples(), strict=True)
    whole = zip(torch.stack(inputs).split(8), torch.tensor(labels).split(8), strict=True)
    return [(x[rank::world], y[rank::world]) for x, y in whole]


def mask() -> Mask:
    generator = torch.Generator().manual_seed(2)
    flags = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in Net().named_parameters()}
    flags["v_proj.weight"][:6] = False
    return Mask({name: flag for name, flag in flags.items() if name != "head.weight"})


def run(name: str, data, model: nn.Module | None = None, **options) -> TaskVector:
    method = name.split(",")[0]
    given = {"mask": mask()} if method == "talos" else {}
    options = {"epochs": 2, "lr": 1e-2, "progress": False, **RUNS.get(name, {}), **given, **options}
    if "steps" in options:
        del options["epochs"]
    return finetune(model or Net(), data, method=method, **options)


def train_each(rank: int, folder: Path) -> None:
    calls = Counter()
    whole = dist.all_reduce
    dist.all_reduce = lambda tensor, *rest: (calls.update({tensor.dtype: tensor.numel()}), whole(tensor, *rest))[1]
    for name in RUNS:
        calls.clear()
        run(name, batches(rank, 2)).save_pretrained(folder / f"{name}{rank}")
        if name == "talos":  # what ranks tell each other grows with the mask, not with the model
            assert calls[torch.float64] == 12 * mask().selected
    run("talos", batches(), Net(0.5)).save_pretrained(folder / f"dropout{rank}")


@needs_gloo
def test_two_ranks_train_as_one(tmp_path):
    on_two_ranks(train_each, tmp_path)
    for name in RUNS:
        first, second = (TaskVector.from_pretrained(tmp_path / f"{name}{rank}") for rank in (0, 1))
        alone = run(name, batches())
        assert first.info["ranks"] == 2
        first, second, alone = first.to_dense(), second.to_dense(), alone.to_dense()
        assert first.keys() == second.keys() == alone.keys()
        for key, expected in alone.items():
            assert torch.equal(first[key], second[key]), (name, key)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(first[key], expected, rtol=0, atol=1e-9)
    dropped, alone = TaskVector.from_pretrained(tmp_path / "dropout0"), run("talos", batches(), Net(0.5))
    assert dropped.cosine(alone) < 0.99  # of the same batches, but each rank drops other entries


def loader(rank: int) -> DataLoader:
    return DataLoader(examples(), batch_size=4, sampler=DistributedSampler(examples(), 2, rank, seed=3))


def interrupting(at: int, rank: int):
    """A forward during whose ``at``-th call the second rank gets SIGTERM."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch[0])

    return forward


def saving(folder: Path, rank: int):
    """A forward that finds a checkpoint from its second call on."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        assert rank or (folder / FILE).exists() == (calls > 1)
        return model(batch[0])

    return forward


def save_together(rank: int, folder: Path) -> None:
    if rank:
        train.SAVE_EVERY_SECONDS = -1.0  # one rank's clock is enough
    run("nonlinear", batches(rank, 2), forward=saving(folder / "each", rank), checkpoint_dir=folder / "each")


def interrupt_and_resume(rank: int, folder: Path) -> None:
    save_together(rank, folder)
    straight = run("talos", loader(rank), Net(0.5))
    place = {"checkpoint_dir": folder / "run"}
    with pytest.raises(KeyboardInterrupt):
        run("talos", loader(rank), Net(0.5), forward=interrupting(8, rank), **place)
    # The other rank's file system has no such file.
    with pytest.raises(TalosError, match="not the same file on all ranks; put checkpoint_dir on a shared"):
        run("talos", loader(rank), Net(0.5), checkpoint_dir=folder / ("run" if rank == 0 else "elsewhere"))
    with pytest.raises(TalosError, match="another rank failed" if rank == 0 else "of a run with other batches"):
        run("talos", loader(0) if rank == 0 else batches(1, 2), Net(0.5), **place)
    resumed = run("talos", loader(rank), Net(0.5), **place)
    once = run("talos", loader(rank), Net(0.5), **place)  # complete: nothing is trained
    for again in (resumed.to_dense(), once.to_dense()):
        assert all(torch.equal(again[name], change) for name, change in straight.to_dense().items())
    with pytest.raises(TalosError, match="another rank failed" if rank else "cannot be written"):
        run("talos", loader(rank), checkpoint_dir=folder / "meeting")  # a file


@needs_gloo
def test_where_one_rank_is_interrupted_all_stop_and_go_on_together(tmp_path):
    on_two_ranks(interrupt_and_resume, tmp_path)
    with pytest.raises(TalosError, match="of a run with ranks=2, this one has ranks=1"):
        run("talos", loader(0), Net(0.5), checkpoint_dir=tmp_path / "run")


def fail(rank: int, folder: Path) -> None:
    model, start = Net(), Net().state_dict()
    bad = [(x * (float("nan") if rank and number == 2 else 1), y) for number, (x, y) in enumerate(batches(rank, 2))]
    with pytest.raises(TalosError, match="epoch 0, batch 2: the logits hold NaN" if rank else "another rank failed"):
        run("nonlinear", bad, model, checkpoint_dir=folder / "bad")
    moved = torch.cat([(p - start[name]).flatten() for name, p in model.state_dict().items()])
    everyone = [torch.empty_like(moved) for _ in range(2)]
    dist.all_gather(everyone, moved)
    assert torch.equal(*everyone) and moved.abs().max() > 0  # the steps before it were taken, on both
    huge = [(x, y) for x, y in batches(rank, 2)]
    loss = lambda logits, labels: logits.sum() * (1e308 if rank else 1.0)  # noqa: E731
    with pytest.raises(TalosError, match="the norm of the gradient is inf|the loss is"):
        run("nonlinear", huge, loss=loss)
    broken = (batch if number < 2 else 1 // 0 for number, batch in enumerate(batches(rank, 2)))
    with pytest.raises(TalosError if rank == 0 else ZeroDivisionError, match="another rank failed|by zero"):
        run("nonlinear", broken if rank else batches(0, 2), steps=4)
    with pytest.raises(TalosError, match="epoch 0, batch 0: not the same parameters have gradients on all ranks"):
        run("nonlinear", batches(rank, 2), Forgetful())


def refuse(rank: int, folder: Path) -> None:
    mine = batches(rank, 2)
    with pytest.raises(TalosError, match=f"{12 - 2 * rank} steps here, another number on another rank"):
        run("nonlinear", mine[: len(mine) - rank])
    with pytest.raises(TalosError, match="another rank failed" if rank == 0 else "without a length"):
        run("nonlinear", mine if rank == 0 else iter(mine))
    other = Net()
    with torch.no_grad():
        other.head.bias[0] += rank
    place = {"checkpoint_dir": folder / "run" if rank else None}
    for model, options in ((other, {}), (Net(), {"seed": rank}), (Net(), {"clip": 1.0 + rank}), (Net(), place)):
        with pytest.raises(TalosError, match="the ranks were given different weights or options"):
            run("nonlinear", mine, model, **options)
    with pytest.raises(TalosError, match="the ranks were given different weights or options"):
        run("talos", mine, mask=mask() if rank else Mask({**mask(), "head.bias": torch.ones(3, dtype=torch.bool)}))


@needs_gloo
@pytest.mark.parametrize("work", [fail, refuse], ids=lambda work: work.__name__)
def test_what_goes_wrong_on_one_rank_ends_all(tmp_path, work):
    on_two_ranks(work, tmp_path)


def add_up(rank: int, folder: Path) -> None:
    ranks.MESSAGE_BYTES = 64  # ten fp32 entries share a message with no more than six others
    generator = torch.Generator().manual_seed(4)
    layouts = [
        torch.rand(10, generator=generator),
        torch.rand(4, 3, generator=generator).t(),
        torch.rand((), generator=generator),
    ]
    layouts += [torch.rand(2, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last), torch.empty(0)]
    tensors = [t.to(dtype) for t in layouts for dtype in (torch.float32, torch.float64, torch.bfloat16)] + layouts
    tensors[2:2] = [torch.rand(6, generator=generator), torch.rand(100, generator=generator)]
    tensors = [t.clone() if rank == 0 else 3 * t for t in tensors]
    expected = [t * 2 if rank == 0 else t / 3 * 2 for t in tensors]
    strides = [t.stride() for t in tensors]
    Ranks().average(tensors)
    for found, want, stride in zip(tensors, expected, strides, strict=True):
        torch.testing.assert_close(found, want)
        assert found.stride() == stride
    Ranks().average([])
    assert Ranks().gathered({"rank": rank}) == [{"rank": 0}, {"rank": 1}]


@needs_gloo
def test_means_of_any_layout(tmp_path):
    on_two_ranks(add_up, tmp_path)


def test_one_rank_alone_shares_nothing(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    assert Ranks().gathered(1) == [1] and Ranks().same({}) and Ranks().agree(3)
    tensor = torch.ones(2)
    Ranks().average([tensor])
    assert run("talos", batches()).info["ranks"] == 1 and tensor.tolist() == [1, 1]
