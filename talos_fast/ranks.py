"""Working over the ranks of torch.distributed: each brings its own batches, all get the same sums and means."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
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

INTERRUPTED, FAILED = 1, 2

MESSAGE_BYTES = 2**25
"""Small tensors travel together, in messages of up to so much."""


class Ranks:
    """The default process group, or one rank alone where there is none.

    Whatever ranks do together begins with an exchange of how each of them fares, and signals wait until it is done: so
    a rank that has failed may leave wherever it is, and the others hear of it instead of waiting. What fails amid a
    sum, for want of memory, still leaves them waiting for their timeout.

    Attributes:
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self) -> None:
        self._grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._grouped else 0
        self.world = dist.get_world_size() if self._grouped else 1
        self._parted = False

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """What fails or is interrupted in here on one rank ends all of them; once only, not to be nested.

        Raises:
            TalosError: another rank failed.
            KeyboardInterrupt: another rank was interrupted.
        """
        try:
            try:
                yield
                with uninterrupted():
                    self._exchange(0)
                    self._parted = True
            except BaseException as error:  # SystemExit too
                self._part(error)
                raise
        except BaseException as error:  # a signal, before the others were told of the first one
            self._part(error)
            raise

    def _part(self, error: BaseException) -> None:
        """Tells the others, once."""
        with uninterrupted():
            if not self._parted:
                self._parted = True
                self._exchange(0, INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sums every tensor over the ranks, in place; all ranks get the same bits."""
        if not self._grouped:
            return
        with self._in_step():
            for group in _messages(tensors):
                if len(group) == 1 and group[0].is_contiguous():
                    self._reduce(group[0])
                    continue
                flat = self._reduce(torch.cat([tensor.flatten() for tensor in group]))
                for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Averages every tensor over the ranks, in place; all ranks get the same bits."""
        if self._grouped:
            self.sum([tensor.div_(self.world) for tensor in tensors])  # divided first: a sum of fp16 would overflow

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
        with self._in_step():
            dist.all_gather_object(found, mine)
        return found

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Until what all ranks do in here is done, none of them leaves."""
        with uninterrupted():
            self._exchange(0)
            yield

    def _exchange(self, number: int, state: int = 0) -> list[int]:
        """A number of every rank; raises where another, but not this one, has failed or was interrupted."""
        if not self._grouped:
            return [number]
        with uninterrupted():  # what came from the others is heard before a signal that came while it waited for them
            mine = torch.tensor([number, state], device="cuda" if dist.get_backend() == "nccl" else "cpu")
            found = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(found, mine)
            numbers, states = zip(*torch.stack(found).tolist(), strict=True)
            self._parted = any(states)
            if not state and FAILED in states:
                raise TalosError("another rank failed; its own message says why")
            if not state and INTERRUPTED in states:
                raise KeyboardInterrupt
        return list(numbers)

    def _reduce(self, tensor: Tensor) -> Tensor:
        # NCCL reduces on the GPU only.
        here = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
        dist.all_reduce(here)
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
