"""Loaders whose order or workers have a state of their own: interrupted and resumed, finetune and calibrate."""

import copy
import itertools
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import rank_cases
import torch
from conftest import interrupting
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from talos_fast import Mask, TalosError, calibrate, finetune, train
from talos_fast.checkpoint import FILE, Checkpoint, Position, Progress, remove
from talos_fast.random_state import RandomState
from talos_fast.ranks import Ranks
from talos_fast.step import Step
from talos_fast.watch import Watch


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(48, 6, generator=generator), torch.arange(48) % 3)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class Noisy(TensorDataset):
    """Augments by a generator of its own."""

    generator = None

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(6, generator=self.generator), y


def noisy(dataset: TensorDataset) -> Noisy:
    found = Noisy(*dataset.tensors)
    found.generator = seeded()
    return found


LOADERS = {
    "data set's generator": lambda d: DataLoader(noisy(d), 8),
    "sampler's generator": lambda d: DataLoader(d, 8, sampler=RandomSampler(d, generator=seeded())),
    "weighted": lambda d: DataLoader(d, 8, sampler=WeightedRandomSampler(torch.ones(48), 48, generator=seeded())),
    "batch sampler's": lambda d: DataLoader(
        d, batch_sampler=BatchSampler(RandomSampler(d, generator=seeded()), 8, drop_last=False)
    ),
    "whole batches": lambda d: DataLoader(
        [d[n : n + 8] for n in range(0, 48, 8)], batch_size=None, sampler=RandomSampler(range(6), generator=seeded())
    ),
    "persistent workers": lambda d: DataLoader(d, 8, shuffle=True, num_workers=1, persistent_workers=True),
    "epochs": lambda d: DataLoader(d, batch_sampler=BatchSampler(DistributedSampler(d, 1, 0), 8, drop_last=False)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_finetune_goes_on_in_the_second_epoch(kind, tmp_path):
    options = {"method": "nonlinear", "lr": 1e-2, "epochs": 3, "checkpoint_dir": tmp_path, "progress": False}
    whole, part, resumed = net(), net(), net()
    finetune(whole, LOADERS[kind](data()), **options | {"checkpoint_dir": None})
    with pytest.raises(KeyboardInterrupt):
        finetune(part, LOADERS[kind](data()), forward=interrupting(9), **options)
    finetune(resumed, LOADERS[kind](data()), **options)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", LOADERS)
def test_calibrate_reads_the_same_batches_whoever_asks(kind, tmp_path):
    loader = LOADERS[kind](data())
    masks = [calibrate(net(), loader, density=0.3, progress=False)]
    masks += [calibrate(net(), LOADERS[kind](data()), density=0.3, checkpoint_dir=tmp_path, progress=False)]
    masks += [calibrate(net(), loader, density=0.3, progress=False)]
    assert masks[0] == masks[1] == masks[2]
    assert masks[0].info["stability"] == masks[1].info["stability"] == masks[2].info["stability"]


def test_calibrate_reads_the_same_batches_after_others_have_drawn(tmp_path):
    """From the loader's generator, and from NumPy's integers for seeds and rounds."""
    loader = DataLoader(data(), 8, shuffle=True, generator=seeded())
    options = {"rounds": np.int64(2), "damage": np.float32(0.5), "checkpoint_dir": tmp_path, "progress": False}
    mask = calibrate(net(), loader, seed=np.int64(3), **options)
    finetune(net(), loader, method="nonlinear", epochs=1, progress=False)
    list(loader)
    assert calibrate(net(), loader, seed=3, **options) == mask


def test_finetune_reads_the_same_batches_after_others_have_drawn():
    loader, models = DataLoader(data(), 8, shuffle=True, generator=seeded()), [net(), net()]
    for model in models:
        finetune(model, loader, method="nonlinear", steps=4, progress=False)
        list(loader)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_devices_that_are_not_used_keep_their_seeds(monkeypatch):
    loader, model = DataLoader(data(), 8), net()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every device"))
    calibrate(model, loader, rounds=1, progress=False)
    finetune(model, loader, method="nonlinear", steps=1, progress=False)


class Drifting(list):
    """Batches that are augmented by what nobody can bring back."""

    def __iter__(self):
        for x, y in list.__iter__(self):
            self.read = getattr(self, "read", 0) + 1
            yield x + 1e-3 * self.read, y


def test_batches_that_are_never_twice_the_same_are_gone_on_with(tmp_path):
    x, y = data().tensors
    batches = [(x[n : n + 8], y[n : n + 8]) for n in range(0, 48, 8)]
    options = {"method": "nonlinear", "epochs": 2, "checkpoint_dir": tmp_path / "fit", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), Drifting(batches), forward=interrupting(4), **options)
    assert finetune(net(), Drifting(batches[::-1]), **options).info["steps"] == 12
    with pytest.raises(TalosError, match="other batches"):
        finetune(net(), batches[::-1], **options)
    for read in (0, 5):
        drifting = Drifting(batches)
        drifting.read = read
        calibrate(net(), drifting, checkpoint_dir=tmp_path / "mask", progress=False)


def test_an_iterator_cannot_be_read_again_to_see(tmp_path):
    x, y = data().tensors
    batches = [(x[n : n + 8], y[n : n + 8]) for n in range(0, 48, 8)]
    options = {"method": "nonlinear", "steps": 6, "checkpoint_dir": tmp_path, "progress": False}
    start = net()
    with pytest.raises(KeyboardInterrupt):
        finetune(copy.deepcopy(start), iter(batches), forward=interrupting(4), **options)
    with pytest.raises(TalosError, match="other batches"):
        finetune(copy.deepcopy(start), iter(batches[::-1]), **options)
    finetune(start, iter(batches), **options)


@pytest.mark.parametrize("presses", [1, 2])
def test_a_checkpoint_is_whole_whenever_one_presses(presses, tmp_path):
    """While the optimizer steps, the parameters are ahead of the position that a checkpoint would name."""
    options = {"method": "nonlinear", "lr": 1e-2, "steps": 8, "progress": False}
    batches, whole, part, resumed = list(DataLoader(data(), 8)), net(), net(), net()
    finetune(whole, batches, **options)
    steps = itertools.count(1)

    def press(*_):
        if next(steps) == 4:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), register_optimizer_step_post_hook(press):
        finetune(part, batches, checkpoint_dir=tmp_path, **options)
    finetune(resumed, batches, checkpoint_dir=tmp_path, **options)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("every", [-1.0, 60.0])
def test_a_step_that_failed_half_way_is_in_no_checkpoint(monkeypatch, tmp_path, every):
    monkeypatch.setattr(train, "SAVE_EVERY_SECONDS", every)
    options = {"method": "nonlinear", "lr": 1e-2, "steps": 8, "progress": False}
    batches, whole, resumed, steps = list(DataLoader(data(), 8)), net(), net(), itertools.count(1)
    finetune(whole, batches, **options)

    def fail(*_):
        if next(steps) == 4:
            raise MemoryError

    with pytest.raises(MemoryError), register_optimizer_step_post_hook(fail):
        finetune(net(), batches, checkpoint_dir=tmp_path, **options)
    assert (tmp_path / FILE).exists() == (every < 0)  # of the step before
    finetune(resumed, batches, checkpoint_dir=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_is_whole_if_one_presses_again_while_it_waits_for_the_device(tmp_path, monkeypatch):
    """As on CUDA, where a save begins by waiting for notes; the second comes at any line of the watch."""
    whole_step, whole_note = Step.__init__, Watch.note
    monkeypatch.setattr(Step, "__init__", lambda self, *given, **rest: whole_step(self, *given, **rest, lag=4))
    options = {"method": "nonlinear", "lr": 1e-2, "steps": 8, "progress": False}
    batches, whole = list(DataLoader(data(), 8)), net()
    finetune(whole, batches, **options)
    for at in itertools.count(1):
        lines, notes = itertools.count(1), itertools.count(1)

        def line(frame, event, arg, at=at, lines=lines):
            if event == "line" and next(lines) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return line

        def note(*given, notes=notes):
            whole_note(*given)
            if next(notes) == 8:  # the last of the fourth step
                os.kill(os.getpid(), signal.SIGINT)
                sys.settrace(lambda frame, event, arg: line if frame.f_code is Watch.settle.__code__ else None)

        resumed, place = net(), tmp_path / str(at)
        monkeypatch.setattr(Watch, "note", note)
        try:
            finetune(net(), batches, checkpoint_dir=place, **options)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            monkeypatch.setattr(Watch, "note", whole_note)
        if next(lines) <= at:
            break
        assert (place / FILE).exists()
        finetune(resumed, batches, checkpoint_dir=place, **options)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), at
    assert at > 10


def test_the_loaders_own_generator_is_as_it_was():
    generator = torch.Generator().manual_seed(42)
    before = generator.get_state()
    loader = DataLoader(data(), 8, shuffle=True, generator=generator)
    finetune(net(), loader, method="nonlinear", lr=1e-2, steps=7, progress=False)
    assert torch.equal(generator.get_state(), before)


def test_generators_of_one_side_are_left_alone():
    """As where a loader has one of its own that had none when it was interrupted."""
    loader = DataLoader(data(), 8, shuffle=True, generator=seeded())
    RandomState(loader, torch.device("cpu")).set(RandomState([], torch.device("cpu")).get())
    assert torch.equal(loader.generator.get_state(), seeded().get_state())


def test_the_seconds_of_an_interrupted_run_count(tmp_path):
    options = {"method": "nonlinear", "lr": 1e-2, "steps": 6, "checkpoint_dir": tmp_path, "progress": False}
    press = interrupting(4)

    def slow(model, batch):
        time.sleep(0.2)
        return press(model, batch)

    with pytest.raises(KeyboardInterrupt):
        finetune(net(), DataLoader(data(), 8), forward=slow, **options)
    assert finetune(net(), DataLoader(data(), 8), **options).info["seconds"] > 0.8
    assert finetune(net(), DataLoader(data(), 8), **options).info["seconds"] > 0.8


def test_a_checkpoint_is_written_every_minute_and_at_the_end(tmp_path, monkeypatch):
    now, saved, save = 0.0, [], Checkpoint.save

    def forward(model, batch):
        nonlocal now
        now += 25
        return model(batch[0])

    def noted(checkpoint, trained, optimizer, progress):
        saved.append(progress.position.step)
        save(checkpoint, trained, optimizer, progress)

    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr("talos_fast.train.time", clock)
    monkeypatch.setattr(Checkpoint, "save", noted)
    options = {"method": "nonlinear", "steps": 8, "checkpoint_dir": tmp_path, "progress": False}
    finetune(net(), DataLoader(data(), 8), forward=forward, **options)
    assert saved == [3, 6, 8]


def test_batches_are_told_the_number_of_the_epoch():
    class Told(list):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    batches = Told(DataLoader(data(), 8))
    finetune(net(), batches, method="nonlinear", epochs=3, progress=False)
    assert batches.epochs == (0, 1, 2)


def test_a_first_run_that_is_done_is_not_repeated(tmp_path):
    whole, part, resumed, calls = net(), net(), net(), []
    options = {"method": "lota", "steps": 4, "lr": 1e-2, "progress": False}

    def counted(model, batch):
        calls.append(batch)
        return model(batch[0])

    finetune(whole, DataLoader(data(), 8), **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(part, DataLoader(data(), 8), forward=interrupting(6), checkpoint_dir=tmp_path, **options)
    finetune(resumed, DataLoader(data(), 8), forward=counted, checkpoint_dir=tmp_path, **options)
    assert len(calls) == 2, "of the second run's four steps, of which two were taken"
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_float64_goes_on_bit_for_bit(tmp_path):
    x, y = data().tensors
    batches = [(x[n : n + 8].double(), y[n : n + 8]) for n in range(0, 48, 8)]
    whole, part, resumed = (net().double() for _ in range(3))
    options = {"method": "nonlinear", "lr": 1e-2, "progress": False}
    finetune(whole, batches, **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(part, batches, forward=interrupting(3), checkpoint_dir=tmp_path, **options)
    finetune(resumed, batches, checkpoint_dir=tmp_path, **options)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_goes_on_with_wide_moments(tmp_path):
    """Under a mask of everything they have the shape of their parameters, and not the dtype."""
    batches = [(x.bfloat16(), y) for x, y in DataLoader(data(), 8)]
    whole, part, resumed = (net().bfloat16() for _ in range(3))
    mask = Mask({name: torch.ones_like(p, dtype=torch.bool) for name, p in whole.named_parameters()})
    options = {"mask": mask, "lr": 1e-2, "progress": False}
    finetune(whole, batches, **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(part, batches, forward=interrupting(3), checkpoint_dir=tmp_path, **options)
    finetune(resumed, batches, checkpoint_dir=tmp_path, **options)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path):
    start = Progress(Position(), {}, {}, "", torch.tensor(0.0))
    Checkpoint(tmp_path / "fit", {}, True, Ranks()).save({}, torch.optim.SGD(net().parameters()), start)
    assert not (tmp_path / "fit").exists()


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    for place in (tmp_path, tmp_path / "first"):
        place.mkdir(exist_ok=True)
        for name in ("checkpoint.safetensors", ".checkpoint.safetensors.half.safetensors"):
            (place / name).touch()
    (tmp_path / "notes.txt").touch()
    remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("method", ["nonlinear", "linearized", "lota", "talos"])
def test_resumes_under_the_mask_of_a_file_and_in_the_layout_of_the_parameters(method, tmp_path):
    """A file has its tensors in alphabetical order and contiguous; the network has a channels_last convolution."""
    rank_cases.mask().save(tmp_path / "mask.safetensors")
    straight = rank_cases.run(method, rank_cases.batches()).to_dense()
    again = {"mask": Mask.load(tmp_path / "mask.safetensors")} if method == "talos" else {}
    with pytest.raises(KeyboardInterrupt):
        rank_cases.run(method, rank_cases.batches(), forward=interrupting(4), checkpoint_dir=tmp_path)
    resumed = rank_cases.run(method, rank_cases.batches(), checkpoint_dir=tmp_path, **again).to_dense()
    assert all(torch.equal(resumed[name], change) for name, change in straight.items())
