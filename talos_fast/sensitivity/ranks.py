"""Scoring over the ranks of torch.distributed: each brings its own batches, all get the sum."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.writing import dumps

T = TypeVar("T")


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
        return int(self._reduce(torch.tensor(count, device="cpu"), dist.ReduceOp.SUM))

    def most(self, count: int) -> int:
        """The largest of a count over the ranks."""
        return int(self._reduce(torch.tensor(count, device="cpu"), dist.ReduceOp.MAX))

    def agree(self, number: int) -> bool:
        """Whether a number is the same on all ranks."""
        return self.most(number) == -self.most(-number)

    def require_same(self, facts: Mapping[str, Any], what: str) -> None:
        """Refuses facts (JSON) that are not the same on all ranks.

        Raises:
            TalosError: on every rank.
        """
        digest = hashlib.blake2b(dumps(facts).encode(), digest_size=6).digest()
        if not self.agree(int.from_bytes(digest)):
            raise TalosError(f"the ranks were given different {what}; give all the same, and each its own batches")

    def together(self, run: Callable[[], T]) -> T:
        """Runs on every rank, and gives what it gave here.

        Where it fails or is interrupted on one, the others stop too instead of waiting for it.

        Raises:
            TalosError: another rank failed.
            KeyboardInterrupt: another rank was interrupted.
        """
        failure: BaseException | None = None
        try:
            found = run()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        mine = 0 if failure is None else 1 if isinstance(failure, KeyboardInterrupt) else 2
        worst = self.most(mine)
        if failure is not None:
            raise failure
        if worst == 2:
            raise TalosError("another rank failed; its own message says why")
        if worst == 1:
            raise KeyboardInterrupt
        return found

    def _reduce(self, tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        if not self._grouped:
            return tensor
        # NCCL reduces on the GPU only.
        here = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
        dist.all_reduce(here, operation)
        return tensor if here is tensor else tensor.copy_(here)
