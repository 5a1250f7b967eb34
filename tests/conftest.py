"""What every test starts from: one seed, poisoned memory, no surprise threads, and an honest count of GPU tests."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples in every run; HYPOTHESIS_PROFILE=default explores others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# `make test` runs two files at a time on two cores, so a second thread would mostly wait; set for the processes that
# tests start, too.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "no CUDA device" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: no CUDA device here")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """For tests of kernels that share out their work over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Has ``caplog`` hold what the library says of what it does."""
    with caplog.at_level(logging.INFO, "talos_fast"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN, so that code which reads memory it did not write is found out."""

    def poison(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
            if plain and tensor.is_floating_point() and not torch.compiler.is_compiling():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, from TALOS_DATA; skips where there is none."""
    folder = Path(os.environ.get("TALOS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set TALOS_DATA to its folder")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["cpu", *([] if HAS_GPU else ["interpreter"]), pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an optimizer steps: "cpu" by the C++ operator, "interpreter" by the Triton kernels on CPU tensors, "cuda".

    A test may also ask for "torch": the CPU, as where no library could be compiled.
    """
    if request.param == "interpreter":
        monkeypatch.setattr("talos_fast.optim.launch.ON_CPU", True)
    if request.param == "torch":
        monkeypatch.setattr("talos_fast.ops.backend", lambda device: "torch")
    return request.param


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `datasets` keeps its Arrow files during a test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def interrupting(at: int, number: signal.Signals = signal.SIGINT):
    """A forward that presses Ctrl-C, or sends another signal, during its call number ``at``."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return model(batch[0])

    return forward
