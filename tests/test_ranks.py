"""What ranks tell each other, and what one rank alone does without."""

from pathlib import Path

import torch
import torch.distributed as dist
from rank_cases import batches, run
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import ranks
from talos_fast.ranks import Ranks


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
