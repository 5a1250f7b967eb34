"""Working over the ranks of torch.distributed: each brings its own batches, all get the same sums and means."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.interrupt import uninterrupted
from talos_fast.writing import dumps

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

INTERRUPTED, FAILED = 1, 2

MESSAGE_BYTES = 2**25
"""Small tensors travel together, in messages of up to so much."""


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
        self._inside = False

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sums every tensor over the ranks, in place; all ranks get the same bits."""
        for group in _messages(tensors) if self._grouped else ():
            if len(group) == 1 and group[0].is_contiguous():
                self._reduce(group[0], dist.ReduceOp.SUM)
                continue
            flat = self._reduce(torch.cat([tensor.flatten() for tensor in group]), dist.ReduceOp.SUM)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Averages every tensor over the ranks, in place; all ranks get the same bits."""
        if self._grouped:
            self.sum(tensor.div_(self.world) for tensor in tensors)  # divided first: a sum of fp16 would overflow

    def maximum(self, tensor: Tensor) -> None:
        """Takes the largest over the ranks, entry by entry, in place."""
        self._reduce(tensor, dist.ReduceOp.MAX)

    def total(self, count: int) -> int:
        """The sum of a count over the ranks."""
        return sum(self._exchange(count))

    def most(self, count: int) -> int:
        """The largest of a count over the ranks."""
        return max(self._exchange(count))

    def agree(self, number: int) -> bool:
        """Whether a number is the same on all ranks."""
        return len(set(self._exchange(number))) == 1

    def same(self, facts: Any) -> bool:
        """Whether facts (JSON) are the same on all ranks."""
        return not self._grouped or self.agree(
            int.from_bytes(hashlib.blake2b(dumps(facts).encode(), digest_size=6).digest())
        )

    def require_same(self, facts: Mapping[str, Any], what: str) -> None:
        """Refuses facts (JSON) that are not the same on all ranks.

        Raises:
            TalosError: on every rank.
        """
        if not self.same(facts):
            raise TalosError(f"the ranks were given different {what}; give all the same, and each its own batches")

    def require_shared(self, path: Path | None, number: int) -> None:
        """Refuses a file of which the ranks have read different numbers.

        Raises:
            TalosError: on every rank.
        """
        if not self.agree(number):
            raise TalosError(f"{path}: not the same file on all ranks; put checkpoint_dir on a shared file system")

    def gathered(self, mine: T) -> list[T]:
        """What every rank has, in the order of the ranks; pickled on its way, so without tensors on a GPU."""
        if not self._grouped:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """What fails or is interrupted in here on one rank ends all of them, instead of letting the others wait.

        They hear of it in their next exchange of numbers, whichever that is: so what is exchanged in here begins with
        one. It may be nested. Only what fails amid a sum, for want of memory, leaves them waiting for their timeout.

        Raises:
            TalosError: another rank failed.
            KeyboardInterrupt: another rank was interrupted.
        """
        self._inside, earlier = True, sys.exception()
        try:
            yield
        except BaseException as error:  # SystemExit too
            self._inside = False
            if not self._is_known(error, earlier):
                with uninterrupted():  # a signal that came while it waited for the others finds the error known
                    self._exchange(0, INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED)
                    self._make_known(error)
            raise
        self._inside = False
        self._exchange(0)

    def together(self, run: Callable[[], T]) -> T:
        """Runs on every rank `as_one`, and gives what it gave here."""
        with self.as_one():
            return run()

    def may_leave(self) -> bool:
        """Whether this rank may be interrupted where it is: in the middle of an exchange the others would wait."""
        return self._inside or not self._grouped

    def _exchange(self, number: int, state: int = 0) -> list[int]:
        """A number of every rank; raises where another, but not this one, has failed or was interrupted."""
        if not self._grouped:
            return [number]
        with uninterrupted():  # what came from the others is heard before a signal that came while it waited for them
            mine = torch.tensor([number, state], device="cuda" if dist.get_backend() == "nccl" else "cpu")
            found = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(found, mine)
            numbers, states = zip(*torch.stack(found).tolist(), strict=True)
            if not state and FAILED in states:
                raise self._make_known(TalosError("another rank failed; its own message says why"))
            if not state and INTERRUPTED in states:
                raise self._make_known(KeyboardInterrupt())
        return list(numbers)

    def _make_known(self, error: E) -> E:
        """Marks an error with which all ranks end: nobody is told again."""
        error.__dict__["_known_to"] = self
        return error

    def _is_known(self, error: BaseException | None, earlier: BaseException | None) -> bool:
        """Whether it is, or what was being handled when it was raised, back to what had been raised earlier."""
        while error is not None:
            if error.__dict__.get("_known_to") is self:
                return True
            error = None if error is earlier or error.__context__ is earlier else error.__context__
        return False

    def _reduce(self, tensor: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        if not self._grouped:
            return tensor
        # NCCL reduces on the GPU only.
        here = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
        dist.all_reduce(here, operation)
        return tensor if here is tensor else tensor.copy_(here)


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype on one device, together no larger than a message."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and (
            (tensor.dtype, tensor.device) != (group[0].dtype, group[0].device)
            or sum(other.nbytes for other in group) + tensor.nbytes > MESSAGE_BYTES
        ):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
