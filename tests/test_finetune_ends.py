"""`finetune` over ranks: what one rank refuses, what fails there or is interrupted, ends all of them."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_cases import Net, batches, interrupting, mask, run
from torch import nn
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, TalosError
from talos_fast.step import Step


class Forgetful(Net):
    """Does not use its queries on the second rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if dist.get_rank() == 0 else self.head(self.v_proj(self.conv(x).flatten(1)))


def fail(rank: int, folder: Path) -> None:
    model, start = Net(), Net().state_dict()
    bad = [(x * (float("nan") if rank and number == 2 else 1), y) for number, (x, y) in enumerate(batches(rank, 2))]
    with pytest.raises(TalosError, match="epoch 0, batch 2: the logits hold NaN" if rank else "another rank failed"):
        run("nonlinear", bad, model, checkpoint_dir=folder / "bad")
    moved = torch.cat([(p - start[name]).flatten() for name, p in model.state_dict().items()])
    everyone = [torch.empty_like(moved) for _ in range(2)]
    dist.all_gather(everyone, moved)
    assert torch.equal(*everyone) and moved.abs().max() > 0  # the steps before it were taken, on both
    loss = lambda logits, labels: logits.sum() * (1e308 if rank else 1.0)  # noqa: E731
    with pytest.raises(TalosError, match="the norm of the gradient is inf|the loss is"):
        run("nonlinear", batches(rank, 2), loss=loss)
    broken = (batch if number < 2 else 1 // 0 for number, batch in enumerate(batches(rank, 2)))
    with pytest.raises(TalosError if rank == 0 else ZeroDivisionError, match="another rank failed|by zero"):
        run("nonlinear", broken if rank else batches(0, 2), steps=4)
    with pytest.raises(TalosError, match="epoch 0, batch 0: not the same parameters have gradients on all ranks"):
        run("nonlinear", batches(rank, 2), Forgetful())
    with pytest.raises(RuntimeError, match="(?i)sparse"):  # the optimizer's, or torch 2.11's norm
        run("nonlinear", [(torch.arange(4), torch.arange(4) % 3)], nn.Embedding(4, 3, sparse=True), clip=None)


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


REFUSED = {
    "parameter": ("talos", {"mask": Mask({"nope": torch.ones(3, dtype=torch.bool)})}),
    "decay": ("nonlinear", {"weight_decay": -1.0}),
    "density": ("lota", {"density": 1.3}),
    "takes": ("nonlinear", {"density": 1}),
    "module inside": ("nonlinear", {"model": nn.DataParallel(Net())}),
}  # fmt: skip


def refused_on_one(rank: int, folder: Path) -> None:
    for message, (method, options) in REFUSED.items():
        with pytest.raises(TalosError, match=message if rank else "another rank failed"):
            run(method, batches(rank, 2), **(options if rank else {}))
    full = run("nonlinear", batches(rank, 2))
    with pytest.raises(TalosError, match="different weights or options"):  # one of them has no first run to make
        run("lota", batches(rank, 2), **({"finetuned": full} if rank else {}))


def stopped_on_one(rank: int, folder: Path) -> None:
    for name in ("nonlinear", "lota"):  # its first run has twelve steps
        with pytest.raises(KeyboardInterrupt):
            run(name, batches(rank, 2), forward=interrupting(12, rank), checkpoint_dir=folder / name)
    leave = lambda model, batch: sys.exit(3) if rank else model(batch[0])  # noqa: E731
    with pytest.raises(SystemExit if rank else TalosError, match="3" if rank else "another rank failed"):
        run("nonlinear", batches(rank, 2), forward=leave)
    whole, calls = Step.share, iter(range(99))

    def share(*given):
        whole(*given)
        if next(calls) == 4 and rank:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    Step.share = share
    with pytest.raises(KeyboardInterrupt):
        run("nonlinear", batches(rank, 2), checkpoint_dir=folder / "twice")
    Step.share = whole
    assert not (folder / "twice").exists()  # they had not come equally far
    model, start = Net(), Net().state_dict()
    other = [(x + 1, y) for x, y in batches(1, 2)]
    with pytest.raises(TalosError, match="other batches" if rank else "another rank failed"):
        run("nonlinear", other if rank else batches(0, 2), model, checkpoint_dir=folder / "nonlinear")
    assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())
    with pytest.raises(TalosError, match="different weights or options"):
        run("nonlinear", batches(rank, 2), checkpoint_dir=folder / "nonlinear", resume=rank == 0)


@needs_gloo
@pytest.mark.parametrize("work", [fail, refuse, refused_on_one, stopped_on_one], ids=lambda work: work.__name__)
def test_what_goes_wrong_on_one_rank_ends_all(tmp_path, work):
    on_two_ranks(work, tmp_path)
