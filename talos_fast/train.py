"""The one trainer: batches through a forward, a loss, accumulation, clipping, a schedule, and an optimizer step."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from talos_fast.batch import Batch, Batches
from talos_fast.checkpoint import Checkpoint, Position, Progress, Saved
from talos_fast.errors import TalosError
from talos_fast.fingerprint import batch_digest
from talos_fast.interrupt import interruptible, uninterrupted
from talos_fast.methods import Setup
from talos_fast.random_state import RandomState, seeded, sources
from talos_fast.ranks import Ranks
from talos_fast.recipe import Recipe
from talos_fast.step import Loss, Step
from talos_fast.storage import require_same_run

SAVE_EVERY_SECONDS = 60.0


def train_mode(model: nn.Module) -> None:
    """Training mode, but norms keep their running statistics: these are not in a task vector.

    If they moved, base + vector would not be the trained model; and a negated variance would be none.
    """
    model.train()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


class Trainer:
    """Runs a `Setup` through a `Recipe`; stops on a step boundary when interrupted, and goes on from a checkpoint.

    On several ranks all take the same steps, by the mean of their gradients, and where one stops, all stop.

    Attributes:
        earlier_seconds: that the run took before it was interrupted.
    """

    def __init__(
        self,
        setup: Setup,
        model: nn.Module,
        batches: Batches,
        recipe: Recipe,
        loss: Loss,
        ranks: Ranks,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._setup, self._batches, self._recipe, self._checkpoint = setup, batches, recipe, checkpoint
        self._ranks = ranks
        self._step = Step(setup, model, loss, clip=recipe.clip, accumulate=recipe.accumulate, amp=recipe.amp)
        self._reached: deque[Progress] = deque()  # after updates of which it is not yet known whether they were good
        self._good, self._updating = 0, False
        self._data = ""
        self.earlier_seconds, self._start = 0.0, time.perf_counter()
        self._random: RandomState  # from here on set by `run`
        self._progress: Progress
        self._epoch_random: dict[str, Tensor]

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self._start

    @property
    def last_loss(self) -> float:
        """Of the last batch."""
        return float(self._progress.loss)

    def run(self, progress: bool) -> None:
        """Trains to the end; the caller's random state is left as it was.

        Raises:
            TalosError: no batch; NaN or infinite logits, loss or gradient (the batch is named, its step is not taken);
                a checkpoint of another run, of which nothing is taken up then; another rank failed.
            KeyboardInterrupt: Ctrl-C, after the step that was running and its checkpoint.
        """
        # Each rank drops out for itself; a generator of the batches' own may deal them out, for all ranks alike.
        with seeded((self._recipe.seed + self._ranks.rank) % 2**63, self._step.device):
            self._random = RandomState(self._batches, self._step.device)
            before = self._random.get()
            self._random.seed_own(self._recipe.seed)
            try:
                self._run(progress)
            finally:
                self._random.set(before)

    def _run(self, progress: bool) -> None:
        resumed, saved = self._resume()
        step = self._progress.position.step
        self._ranks.require_shared(self._checkpoint.path if self._checkpoint else None, step)
        with interruptible() as interrupted:
            if saved is not None:  # only now: what one rank refuses, none takes up
                saved.restore(self._setup.trained, self._setup.optimizer)
            if step >= self._recipe.steps:
                return
            try:
                complete = self._loop(resumed, interrupted, progress)
                self._save()
            except BaseException:
                # The last good state, unless an update failed half-way; several ranks may not have come equally far.
                if self._ranks.world == 1 and not self._updating:
                    self._save()
                raise
            if not complete:
                raise KeyboardInterrupt

    def _loop(self, resumed: Iterator[Batch] | None, interrupted: Callable[[], bool], progress: bool) -> bool:
        """Whether all steps were taken: not if it was interrupted, on whichever rank."""
        start, steps, last_save = self._progress.position.step, self._recipe.steps, time.monotonic()
        stream = self._stream(resumed)
        hidden = None if progress and self._ranks.rank == 0 else True
        with tqdm(total=steps, initial=start, desc="train", disable=hidden, leave=False) as bar:
            for done in range(start + 1, steps + 1):
                due = 2 if interrupted() else int(time.monotonic() - last_save > SAVE_EVERY_SECONDS)
                due = self._ranks.most(due)  # ranks stop, and save, before the same step
                if due == 2:
                    return False
                if due:
                    self._save()
                    last_save = time.monotonic()
                epoch, index = self._backward(stream)
                where = f"epoch {epoch}, batch {index}"
                self._step.share(self._ranks, where)
                self._update(where, Position(done, epoch, index + 1))
                bar.update()
        return True

    def _backward(self, stream: Iterator[tuple[int, int, Batch]]) -> tuple[int, int]:
        """Adds up the gradients of a step; epoch and index of its last batch."""
        for epoch, index, batch in islice(stream, self._recipe.accumulate):
            self._step.backward(batch, f"epoch {epoch}, batch {index}")
        return epoch, index

    def _stream(self, resumed: Iterator[Batch] | None) -> Iterator[tuple[int, int, Batch]]:
        """(epoch, index, batch) from the current position, epoch after epoch."""
        epoch, skip = self._progress.position.epoch, self._progress.position.batch
        while True:
            iterator = resumed or self._open(epoch)
            deque(islice(iterator, skip), maxlen=0)
            if resumed:
                # The order of the batches came from the epoch's start; all else goes on from the last step.
                self._random.set(self._progress.step_random)
            for index, batch in enumerate(iterator, skip):
                yield epoch, index, batch
            epoch, skip, resumed = epoch + 1, 0, None

    def _open(self, epoch: int, known: Progress | None = None) -> Iterator[Batch]:
        """An epoch's batches, from its first one; ``known``: with the random states that were recorded."""
        if known:
            self._random.set(known.epoch_random)
        self._epoch_random = self._random.get()
        for source in sources(self._batches):
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)
        iterator = iter(self._batches)
        first = list(islice(iterator, 1))
        if not first:
            raise TalosError(f"epoch {epoch}: there is no batch (an iterator can be read only once; pass a list)")
        if self._checkpoint:
            self._data = batch_digest(first[0])
        return chain(first, iterator)

    def _update(self, where: str, position: Position) -> None:
        self._step.clip(where, then=self._count_good)
        with uninterrupted():  # a checkpoint says how many steps its parameters have taken
            self._updating = True
            self._step.update(self._recipe.lr_at(position.step - 1))
            self._step.release()
            self._reached.append(
                Progress(
                    position, self._epoch_random, self._random.get(), self._data, self._step.last_loss, self._seconds()
                )
            )
            self._updating = False
        self._advance()

    def _count_good(self) -> None:
        self._good += 1

    def _advance(self) -> None:
        """Progress is made by steps that are both taken and known to be good."""
        while self._good and self._reached:
            self._progress = self._reached.popleft()
            self._good -= 1

    def _resume(self) -> tuple[Iterator[Batch] | None, Saved | None]:
        """The running epoch of the checkpoint's run, and what that had moved; None if there is none to go on with."""
        random = self._random.get()
        self._progress = Progress(Position(), random, random, "", torch.tensor(math.nan))
        saved = self._checkpoint.read() if self._checkpoint else None
        if saved is None or self._checkpoint is None:
            return None, None
        position, known = saved.progress.position, saved.progress.data
        iterator = self._open(position.epoch, saved.progress)
        if (found := self._data) != known and not isinstance(self._batches, Iterator):
            iterator = self._open(position.epoch, saved.progress)
        if found == self._data:  # batches that are never twice the same cannot be told from others
            require_same_run(self._checkpoint.path, {"data": known}, {"data": found})
        self._progress, self.earlier_seconds = saved.progress, saved.progress.seconds
        return iterator, saved

    def _save(self) -> None:
        try:
            self._step.watch.settle()
        except TalosError:  # the steps before the bad one are good; if a signal came first, nobody knows which are
            self._write()
            raise
        self._write()

    def _write(self) -> None:
        self._advance()
        if self._checkpoint:
            self._checkpoint.save(self._setup.trained, self._setup.optimizer, self._progress)
