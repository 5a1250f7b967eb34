"""Failures and signals where one rank waits for another, or between two exchanges: none is left waiting."""

import itertools
import os
import signal
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from rank_cases import Net, batches, interrupting, run
from two_ranks import needs_gloo, on_two_ranks

import talos_fast
from talos_fast import TalosError, calibrate
from talos_fast.checkpoint import Saved
from talos_fast.ranks import Ranks
from talos_fast.step import Step

C = sys.modules["talos_fast.calibrate"]


def press(at: float) -> None:
    """Ctrl-C from outside, when the main thread may wait in C."""
    if os.fork() == 0:
        time.sleep(at)
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)


def meets(expected, work) -> None:
    with pytest.raises(expected):
        work()
    assert Ranks().gathered(1) == [1, 1]  # in step


def restoring(rank: int, folder: Path) -> None:
    for number, act in enumerate((lambda: 1 // 0, lambda: os.kill(os.getpid(), signal.SIGINT))):
        place, whole = folder / f"c{number}", Saved.restore
        meets(KeyboardInterrupt, lambda p=place: run("nonlinear", batches(rank, 2), forward=interrupting(5, rank),
                                                     checkpoint_dir=p))  # fmt: skip
        Saved.restore = (lambda *given, a=act: a()) if rank else whole
        expected = KeyboardInterrupt if number else ZeroDivisionError if rank else TalosError
        meets(expected, lambda p=place: run("nonlinear", batches(rank, 2), checkpoint_dir=p))
        Saved.restore = whole


class Lines:
    """Counts the lines of some files that are executed as one of several ranks; at one of them it acts."""

    def __init__(self, files: tuple[str, ...], act=None, at: int | None = None) -> None:
        self.files, self.act, self.at, self.count = files, act, at, 0

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.endswith(self.files) else None

    def line(self, frame, event, arg):
        self.count += event == "line"
        if self.count == self.at:
            self.at = None
            self.act()
        return self.line


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise MemoryError


WHOLE = tuple(str(path) for path in Path(talos_fast.__file__).parent.rglob("*.py"))
WORK = tuple(f"talos_fast/{name}.py" for name in ("train", "step", "checkpoint", "rounds", "sensitivity/scorer"))


def at_any_line(rank: int, folder: Path) -> None:
    data = batches(rank, 2)[:2]
    works = [
        lambda place: run("talos", data, checkpoint_dir=place),
        lambda place: calibrate(Net(), data, density=0.2, rounds=2, progress=False, checkpoint_dir=place),
    ]
    for (number, work), (act, files) in itertools.product(enumerate(works), ((interrupt, WHOLE), (fail, WORK))):
        lines, endings = Lines(files), set()
        sys.settrace(lines.call)
        work(folder / f"{number} {act.__name__}")
        sys.settrace(None)
        _, count = Ranks().gathered(lines.count)
        for at in range(count // 50, count, count // 25):
            ending = None
            try:
                sys.settrace(Lines(files, act, at).call if rank else None)
                work(folder / f"{number} {act.__name__} {at}")
            except (TalosError, KeyboardInterrupt, MemoryError) as error:
                ending = type(error)
            finally:
                sys.settrace(None)
            theirs, mine = Ranks().gathered((at, ending))
            assert theirs[0] == mine[0] == at  # in step
            endings.add((theirs[1], mine[1]))
        assert endings == {(KeyboardInterrupt, KeyboardInterrupt) if act is interrupt else (TalosError, MemoryError)}


def late_notes(rank: int, folder: Path) -> None:
    """As on CUDA: the ranks come to know of a bad step at different places."""
    whole = Step.__init__
    Step.__init__ = lambda self, *given, **options: whole(self, *given, **{**options, "lag": 4})
    bad = [(x * (float("nan") if rank and n == 2 else 1), y) for n, (x, y) in enumerate(batches(rank, 2))]
    with pytest.raises(TalosError, match="epoch 0, batch 2: the logits" if rank else "batch of another rank is bad"):
        run("talos", bad, checkpoint_dir=folder / "c")
    assert Ranks().gathered(1) == [1, 1]


def pressed_while_waiting(rank: int, folder: Path) -> None:
    def slow():
        if rank == 0:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGINT)
        yield from batches(rank, 2)

    if rank:
        press(0.7)
    meets(KeyboardInterrupt, lambda: calibrate(Net(), slow(), density=0.1, rounds=2, progress=False))

    class Modes(Net):
        armed = False

        def train(self, mode=True):
            if rank and not mode and self.armed:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train(mode)

    fails = lambda model, batch: 1 // 0 if rank else model(batch[0])  # noqa: E731
    model = Modes().eval()
    model.armed = True
    meets(KeyboardInterrupt, lambda: run("nonlinear", batches(rank, 2), model, forward=fails))


def handled_before(rank: int, folder: Path) -> None:
    future = Future()
    future.set_exception(OSError("disk"))

    def data():
        if rank:
            future.result()
        yield from batches(rank, 2)

    expected = OSError if rank else TalosError
    try:
        run("nonlinear", data(), steps=3)
    except expected:
        meets(expected, lambda: run("nonlinear", data(), steps=3))


def amid_sums(rank: int, folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    whole = Ranks.sum, C._RoundScores.begin_batch, C._lowest

    def summing(self, tensors):
        if rank:
            os.kill(os.getpid(), signal.SIGTERM)
        whole[0](self, tensors)

    def fails(*given):
        raise MemoryError

    score = lambda **options: calibrate(Net(), batches(rank, 2), density=0.1, progress=False, **options)  # noqa: E731
    Ranks.sum = summing
    meets(SystemExit if rank else TalosError, lambda: run("nonlinear", batches(rank, 2)))
    meets(SystemExit if rank else TalosError, lambda: score(stability=True))
    Ranks.sum = whole[0]
    if rank:
        C._lowest = fails
    meets(MemoryError if rank else TalosError, lambda: score(stability=True))
    C._lowest = whole[2]
    if rank:
        C._RoundScores.begin_batch = lambda self, index: fails() if index else whole[1](self, index)
    meets(MemoryError if rank else TalosError, lambda: score(stability=False))


def pressed_while_failing(rank: int, folder: Path) -> None:
    """One signal at any line by which a rank that has failed tells the others."""
    for at in range(1, 30):
        lines = Lines(("talos_fast/ranks.py",), interrupt, at)

        def fails(model, batch, lines=lines):
            if rank:
                sys.settrace(lines.call)
                frame = sys._getframe()
                while frame := frame.f_back:  # those that run already
                    frame.f_trace = lines.call(frame, "call", None)
                raise ZeroDivisionError
            return model(batch[0])

        try:
            run("nonlinear", batches(rank, 2), forward=fails)
        except (TalosError, KeyboardInterrupt, ZeroDivisionError) as error:
            ending = type(error)
        finally:
            sys.settrace(None)
        assert Ranks().gathered(at) == [at, at]  # in step
        assert ending is not ZeroDivisionError or lines.at


def preempted(rank: int, folder: Path) -> None:
    """A scheduler's warning, whose handler raises, at any line of what ranks do together."""

    class PreemptedError(Exception):
        pass

    def handler(*_):
        raise PreemptedError

    signal.signal(signal.SIGUSR1, handler)
    for at in range(150, 230, 7):
        lines = Lines(("talos_fast/ranks.py",), lambda: os.kill(os.getpid(), signal.SIGUSR1), at)
        with pytest.raises(PreemptedError if rank else TalosError):
            sys.settrace(lines.call if rank else None)
            try:
                run("talos", batches(rank, 2)[:2])
            finally:
                sys.settrace(None)
        assert Ranks().gathered(at) == [at, at]


@needs_gloo
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    "work", [restoring, at_any_line, late_notes, pressed_while_waiting, handled_before, amid_sums,
             pressed_while_failing, preempted],
    ids=lambda work: work.__name__,
)  # fmt: skip
def test_nobody_waits(tmp_path, work):
    on_two_ranks(work, tmp_path)


def test_an_error_with_many_before_it_comes_through():
    def forward(model, batch):
        last = ValueError(0)
        for number in range(3000):
            try:
                try:
                    raise last
                except ValueError:
                    raise ValueError(number)  # noqa: B904
            except ValueError as error:
                last = error
        raise last

    with pytest.raises(ValueError, match="2999"):
        run("nonlinear", batches(), forward=forward)
