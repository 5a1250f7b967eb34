"""Scoring over the ranks of torch.distributed: each brings its own batches, all get the sum."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from talos_fast.errors import TalosError


class Ranks:
    """The default process group, or one rank alone where there is none.

    Attributes:
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self) -> None:
        self._grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._grouped else 0
        self.world = dist.get_world_size() if self._grouped else 1

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sums every tensor over the ranks, in place; all ranks get the same bits."""
        for tensor in tensors:
            self._reduce(tensor, dist.ReduceOp.SUM)

    def total(self, count: int) -> int:
        """The sum of a count over the ranks."""
        return int(self._reduce(torch.tensor(count), dist.ReduceOp.SUM))

    def most(self, count: int) -> int:
        """The largest of a count over the ranks."""
        return int(self._reduce(torch.tensor(count), dist.ReduceOp.MAX))

    def together(self, run: Callable[[], None]) -> None:
        """Runs on every rank; where it fails or is interrupted on one, the others stop too instead of waiting for it.

        Raises:
            TalosError: another rank failed.
            KeyboardInterrupt: another rank was interrupted.
        """
        failure: BaseException | None = None
        try:
            run()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        mine = 0 if failure is None else 1 if isinstance(failure, KeyboardInterrupt) else 2
        worst = int(self._reduce(torch.tensor(mine), dist.ReduceOp.MAX))
        if failure is not None:
            raise failure
        if worst == 2:
            raise TalosError("another rank failed while scoring; its own message says why")
        if worst == 1:
            raise KeyboardInterrupt

    def _reduce(self, tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        if not self._grouped:
            return tensor
        # NCCL reduces on the GPU only.
        here = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
        dist.all_reduce(here, operation)
        return tensor if here is tensor else tensor.copy_(here)
