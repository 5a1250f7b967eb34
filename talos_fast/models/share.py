"""`Share`: batches dealt out to processes that train together."""

from collections.abc import Iterator

from torch.utils.data import BatchSampler, Sampler


class Share(BatchSampler):
    """Of each batch every ``world``-th example, from the ``rank``-th on.

    Of a last batch that does not divide, the last few examples are left out, fewer than ``world``: all shares are
    equally large, so that the mean of their gradients is the gradient of the whole batch.

    Args:
        sampler: the order of all examples, the same on all ranks.
        batch_size: of the whole batch, a multiple of ``world``.
        rank, world: which share, of how many.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, world: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self._rank, self._world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            if size := len(batch) // self._world:
                yield batch[self._rank :: self._world][:size]

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)  # type: ignore[arg-type]
        return full + (rest >= self._world)
