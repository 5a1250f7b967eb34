"""`finetune` over the ranks of torch.distributed: two processes train as one on all of their samples."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_cases import RUNS, Net, batches, examples, interrupting, mask, run
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, TalosError, TaskVector, train
from talos_fast.checkpoint import FILE


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


def require_alike(tensors: dict[str, torch.Tensor]) -> None:
    everyone = [None, None]
    dist.all_gather_object(everyone, tensors)
    assert all(torch.equal(everyone[1][name], tensor) for name, tensor in everyone[0].items())


def orders(rank: int, folder: Path) -> None:
    if rank == 0:
        mask().save(folder / "mask.safetensors")
    dist.barrier()
    mine = mask() if rank == 0 else Mask.load(folder / "mask.safetensors")  # sorted by name
    require_alike(run("talos", batches(rank, 2), mask=mine).to_dense())
    require_alike(run("l-lora", batches(rank, 2), rank=2, compat="released").to_dense())


@needs_gloo
def test_the_order_of_a_mask_or_a_set_is_nothing_to_ranks(tmp_path):
    on_two_ranks(orders, tmp_path)


class Dealt(Sampler):
    """Deals out one permutation, drawn from a generator that is seeded alike on all ranks."""

    def __init__(self, rank: int) -> None:
        self.generator, self.rank, self.seen = torch.Generator().manual_seed(5), rank, []

    def __iter__(self):
        self.seen = torch.randperm(48, generator=self.generator)[self.rank :: 2].tolist()
        return iter(self.seen)

    def __len__(self) -> int:
        return 24


def deal(rank: int, folder: Path) -> None:
    dealt, seen = Dealt(rank), [None, None]
    run("nonlinear", DataLoader(examples(), batch_size=4, sampler=dealt), epochs=1)
    dist.all_gather_object(seen, dealt.seen)
    assert sorted(seen[0] + seen[1]) == list(range(48))


@needs_gloo
def test_a_sampler_deals_every_sample_to_one_rank(tmp_path):
    on_two_ranks(deal, tmp_path)


def loader(rank: int) -> DataLoader:
    return DataLoader(examples(), batch_size=4, sampler=DistributedSampler(examples(), 2, rank, seed=3))


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
