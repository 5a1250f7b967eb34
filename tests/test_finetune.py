"""finetune and evaluate: what trains, what never changes, interruption, and bad input."""

import copy
import signal
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adam_cases import device_of
from conftest import HAS_GPU, interrupting
from methods_cases import case, mask_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from talos_fast import Mask, TalosError, calibrate, evaluate, finetune, profile
from talos_fast.methods import METHODS
from talos_fast.recipe import Recipe


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(12, 32), nn.Dropout(0.1), nn.Linear(32, 32)
        self.register_buffer("head", torch.randn(32, 4))

    def forward(self, x):
        return torch.tanh(self.b(self.drop(torch.relu(self.a(x))))) @ self.head


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def loader() -> DataLoader:
    torch.manual_seed(1)
    x = torch.randn(200, 12)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=25, shuffle=True)


def state(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_talos_learns_and_moves_nothing_else(net):
    base = copy.deepcopy(net)
    mask = calibrate(net, loader(), density=0.3, progress=False)
    vector = finetune(net, loader(), mask=mask, lr=2e-2, epochs=6, progress=False)
    assert float(evaluate(net, loader())) > float(evaluate(base, loader())) + 0.3
    for (name, p), q in zip(net.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p[~mask[name]], q[~mask[name]])
    assert vector.nnz <= mask.selected
    assert equal(state(vector.apply_to(base)), state(net))
    assert vector.info["method"] == "talos" and vector.info["steps"] == 48


def test_nonlinear_trains_everything(net):
    base = copy.deepcopy(net)
    vector = finetune(net, loader(), method="nonlinear", lr=1e-2, steps=30, progress=False)
    assert set(vector) == {name for name, _ in net.named_parameters()}
    assert equal(state(vector.apply_to(base)), state(net))


def test_gradients_of_before_count_for_nothing(net):
    other = copy.deepcopy(net)
    F.cross_entropy(net(loader().dataset.tensors[0]), loader().dataset.tensors[1]).backward()
    for p in net.parameters():
        p.grad.fill_(float("nan"))
    with torch.no_grad():  # the caller's own mode counts for nothing either
        finetune(net, loader(), method="nonlinear", lr=1e-2, steps=3, progress=False)
    finetune(other, loader(), method="nonlinear", lr=1e-2, steps=3, progress=False)
    assert equal(state(net), state(other))


def test_a_mask_of_what_the_forward_does_not_use(net):
    net.unused = nn.Linear(2, 2)
    with pytest.raises(TalosError, match="epoch 0, batch 0: the loss depends on nothing that trains; the forward does"):
        finetune(net, loader(), mask=Mask({"unused.weight": torch.ones(2, 2, dtype=torch.bool)}), progress=False)


def test_a_full_mask_is_nonlinear(net):
    other = copy.deepcopy(net)
    full = Mask({name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()})
    finetune(net, loader(), mask=full, lr=1e-2, steps=20, progress=False)
    finetune(other, loader(), method="nonlinear", lr=1e-2, steps=20, progress=False)
    for a, b in zip(state(net), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_model_keeps_its_mode_flags_and_the_caller_its_random_state(net):
    net.eval()
    net.b.bias.requires_grad_(False)
    data = loader()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    finetune(net, data, method="nonlinear", steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        not net.training and not net.b.bias.requires_grad and net.a.weight.requires_grad and net.a.weight.grad is None
    )


@pytest.mark.parametrize("method", ["nonlinear", "talos", "linearized"])
def test_running_statistics_stay_so_base_and_vector_are_the_trained_model(method):
    last = nn.Linear(16, 4) if method == "linearized" else nn.utils.spectral_norm(nn.Linear(16, 4))
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), last)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    base = copy.deepcopy(net)
    mask = Mask({name: torch.rand_like(p) < 0.5 for name, p in net.named_parameters()}) if method == "talos" else None
    vector = finetune(net, loader(), method=method, mask=mask, lr=1e-2, steps=10, progress=False)
    assert equal(net.buffers(), base.buffers()) and net[1].training
    assert equal(state(vector.apply_to(base)), state(net))


# place, steps, batches a step, whether the loader has a generator of its own
RESUMED = [("cpu", 20, 1, False), ("cpu", 20, 1, True), ("cpu", 20, 3, False), ("cpu", 20, 3, True)]
RESUMED += [("torch", 20, 3, True), *([] if HAS_GPU else [("interpreter", 8, 3, True)])]
RESUMED += [pytest.param("cuda", 20, 3, True, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("place, steps, accumulate, own_generator", RESUMED, indirect=["place"])
def test_interrupted_and_resumed_is_bit_identical(net, tmp_path, place, steps, accumulate, own_generator):
    net.to(device_of(place))

    def data():
        batches = loader()
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return DataLoader(batches.dataset, batch_size=25, shuffle=True, generator=generator)

    handler = signal.getsignal(signal.SIGINT)
    mask = calibrate(net, loader(), density=0.5, progress=False)
    options = {"mask": mask, "lr": 1e-2, "steps": steps, "accumulate": accumulate, "progress": False}
    whole = copy.deepcopy(net)
    vector = finetune(whole, data(), **options)
    last = steps * accumulate - (13 if accumulate == 1 else 15)
    for number, at in enumerate((4, 9, last)):
        part = copy.deepcopy(net)
        with pytest.raises(KeyboardInterrupt):
            finetune(part, data(), forward=interrupting(at), checkpoint_dir=tmp_path, **options)
        assert equal(state(part), state(whole)) == (number == 2), "the third is in the last step"
    resumed = copy.deepcopy(net)
    again = finetune(resumed, data(), checkpoint_dir=tmp_path, **options)
    assert equal(state(resumed), state(whole))
    assert (vector - again).norm() == 0
    assert signal.getsignal(signal.SIGINT) is handler
    finished = copy.deepcopy(net)
    same = finetune(finished, data(), checkpoint_dir=tmp_path, **options)
    assert equal(state(finished), state(whole))
    assert vector.info["last_loss"] == again.info["last_loss"] == same.info["last_loss"]


def test_a_scheduler_that_ends_the_program_leaves_a_checkpoint(net, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            net, loader(), method="nonlinear", forward=interrupting(2, signal.SIGTERM), checkpoint_dir=tmp_path,
            progress=False,
        )  # fmt: skip
    assert (tmp_path / "checkpoint.safetensors").exists() and signal.getsignal(signal.SIGTERM) is handler


def test_a_checkpoint_of_another_run_is_refused(net, tmp_path):
    start = copy.deepcopy(net)
    finetune(net, loader(), method="nonlinear", steps=2, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(TalosError, match="a run with steps=2, this one has steps=3"):
        finetune(start, loader(), method="nonlinear", steps=3, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(TalosError, match="a run with base="):
        finetune(net, loader(), method="nonlinear", steps=2, checkpoint_dir=tmp_path, progress=False)
    finetune(start, loader(), method="nonlinear", steps=3, checkpoint_dir=tmp_path, resume=False, progress=False)


@pytest.mark.parametrize("stopped", [True, False], ids=["interrupted", "finished"])
def test_a_checkpoint_of_other_data_is_refused_and_nothing_is_touched(net, tmp_path, stopped):
    """With the same labels, such as two data sets sorted by class have under one seed."""
    data = loader().dataset
    mine, theirs = (DataLoader(part, batch_size=25, shuffle=True) for part in (data, [(-x, y) for x, y in data]))
    options = {"method": "nonlinear", "steps": 6, "checkpoint_dir": tmp_path, "progress": False}
    start = copy.deepcopy(net)
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
        finetune(net, mine, forward=interrupting(4 if stopped else -1), **options)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    other = copy.deepcopy(start)
    with pytest.raises(TalosError, match="other batches: other data, another batch size, or another order; use"):
        finetune(other, theirs, **options)
    assert equal(state(other), state(start)) and (tmp_path / "checkpoint.safetensors").read_bytes() == kept
    finetune(start, mine, **options)


def test_a_run_that_took_no_step_says_why_and_leaves_no_checkpoint(net, tmp_path):
    with pytest.raises(TalosError, match="epoch 0, batch 0: labels 7 … 7"):
        finetune(net, [(torch.randn(8, 12), torch.full((8,), 7))], method="nonlinear", checkpoint_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["logits", "loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(net, tmp_path, where):
    """Batch 5 goes wrong; the model stays where step 5 left it, and so does the checkpoint."""
    calls = 0

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    def forward(model, batch):
        nonlocal calls
        calls += 1
        logits = model(batch[0])
        if calls == 6 and where != "loss":
            return logits * float("nan") if where == "logits" else Explode.apply(logits)
        return logits

    def loss(logits, labels):
        value = nn.functional.cross_entropy(logits, labels)
        return value * float("inf") if calls == 6 and where == "loss" else value

    good = copy.deepcopy(net)
    data = DataLoader(loader().dataset, batch_size=25)
    options = {"method": "nonlinear", "lr": 1e-2, "schedule": "constant", "warmup": 0, "progress": False}
    finetune(good, data, steps=5, **options)
    said = {"logits": "logits hold NaN", "loss": "the loss is inf", "gradient": "norm of the gradient is"}[where]
    with pytest.raises(TalosError, match=f"epoch 0, batch 5: .*{said}"):
        finetune(net, data, steps=8, forward=forward, loss=loss, checkpoint_dir=tmp_path, **options)
    assert equal(state(net), state(good))


def test_schedule_and_warmup():
    recipe = Recipe(steps=10, lr=1.0, warmup=2, schedule="cosine", clip=None, accumulate=1, amp="off", seed=0)
    rates = [recipe.lr_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[9] > 0
    assert all(a >= b for a, b in pairwise(rates[1:]))


def test_accumulation_is_a_larger_batch(net):
    other = copy.deepcopy(net.eval())
    net.drop.p = other.drop.p = 0.0
    x, y = loader().dataset.tensors
    small = [(x[n : n + 20], y[n : n + 20]) for n in range(0, 200, 20)]
    large = [(x[n : n + 40], y[n : n + 40]) for n in range(0, 200, 40)]
    finetune(net, small, method="nonlinear", lr=1e-3, steps=5, accumulate=2, progress=False)
    finetune(other, large, method="nonlinear", lr=1e-3, steps=5, progress=False)
    for a, b in zip(state(net), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"method": "magic"}, "method='magic': choose one of nonlinear, linearized, l-lora, lota, talos"),
    ({"method": "talos"}, "needs mask="),
    ({"method": "talos", "mask": "mask.safetensors"}, "mask= is a str; give a talos_fast.Mask"),
    ({"method": "lota", "finetuned": {}}, "finetuned= is a dict; give a talos_fast.TaskVector"),
    ({"epochs": 1, "steps": 1}, "give one of them"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 2.5}, "steps=2.5: must be an integer, at least 1"),
    ({"seed": -1}, "seed=-1: must be an integer, from 0 to"),
    ({"warmup": -1}, "warmup=-1: must be an integer, at least 0"),
    ({"lr": 0.0}, "lr=0.0"),
    ({"lr": float("inf")}, "lr=inf: must be positive and finite"),
    ({"weight_decay": -1}, "weight_decay=-1.0: must be finite, at least 0"),
    ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ({"clip": 0.0}, "clip=0.0"),
    ({"schedule": "linear"}, "schedule='linear'"),
    ({"amp": "fp8"}, "amp='fp8'"),
    ({"accumulate": 0}, "accumulate=0: must be an integer, at least 1"),
    ({"accumulate": 99}, "make no step of accumulate=99"),
])  # fmt: skip
def test_bad_arguments_are_named(net, options, message):
    with pytest.raises(TalosError, match=message):
        finetune(net, loader(), progress=False, **{"method": "nonlinear", **options})


@pytest.mark.parametrize("method", METHODS)
def test_compiled(method, tmp_path, monkeypatch):
    """The same vector, with a last batch that is smaller; the compiler's back end is not what is tested."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    vectors = []
    for compile in (False, True):
        torch.manual_seed(0)
        model, batches = case("clip", tmp_path)
        batches[-1] = tuple(part[:3] for part in batches[-1])
        options = {"mask": mask_of(model)} if method == "talos" else {}
        torch._dynamo.utils.counters.clear()
        vectors.append(finetune(model, batches, method=method, lr=1e-3, compile=compile, progress=False, **options))
        assert bool(torch._dynamo.utils.counters["frames"]["ok"]) is compile
    plain, found = (vector.to_dense() for vector in vectors)
    norm = torch.cat([delta.flatten() for delta in plain.values()]).norm()
    assert found.keys() == plain.keys() and norm > 0
    assert torch.cat([(found[name] - plain[name]).flatten() for name in plain]).norm() < 1e-3 * norm


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_compiled_runs_do_not_share_a_limit(net, monkeypatch):
    """torch counts recompilations by code object, and is eager from its limit on, with a warning in its own log."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    mask = Mask({name: torch.rand_like(p) < 0.5 for name, p in net.named_parameters()})
    for run in range(4):
        torch._dynamo.utils.counters.clear()
        finetune(copy.deepcopy(net), loader(), mask=mask, compile=True, steps=2, progress=False)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, run


@pytest.mark.parametrize("wrap", [nn.DataParallel, DistributedDataParallel])
def test_what_is_wrapped_for_several_devices_is_refused(net, wrap, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(TalosError, match=f"{wrap.__name__}: pass the .module inside"):
            finetune(wrap(net), loader(), method="nonlinear", progress=False)
    finally:
        dist.destroy_process_group()


def test_what_is_compiled_is_refused(net):
    mask = calibrate(net, loader(), progress=False)
    with pytest.raises(TalosError, match=r"OptimizedModule: the module is compiled; .* compile=True"):
        finetune(torch.compile(net), loader(), mask=mask)
    net.b.compile()
    for run in (finetune, profile):
        with pytest.raises(TalosError, match="b: the module is compiled"):
            run(net, loader(), method="nonlinear")


def test_masks_that_do_not_fit(net):
    mask = calibrate(net, loader(), progress=False)
    with pytest.raises(TalosError, match="mask= means nothing to method 'nonlinear', which takes none"):
        finetune(net, loader(), method="nonlinear", mask=mask, progress=False)
    with pytest.raises(TalosError, match="the mask belongs to another base"):
        finetune(Net(), loader(), mask=mask, progress=False)
    empty = type(mask)({"a.weight": torch.zeros(32, 12, dtype=torch.bool)})
    with pytest.raises(TalosError, match="selects none of its 384 entries"):
        finetune(net, loader(), mask=empty, progress=False)


def test_batches_that_run_dry(net):
    with pytest.raises(TalosError, match="pass steps="):
        finetune(net, (batch for batch in loader()), method="nonlinear", epochs=2, progress=False)
    with pytest.raises(TalosError, match="epoch 1: there is no batch"):
        finetune(net, iter(list(loader())), method="nonlinear", steps=20, progress=False)


def test_evaluate_counts(net):
    x, y = loader().dataset.tensors
    expected = int((net.eval()(x).argmax(1) == y).sum())
    accuracy = evaluate(net.train(), loader())
    assert (accuracy.correct, accuracy.total) == (expected, 200)
    assert float(accuracy) == expected / 200 and net.training
    with pytest.raises(TalosError, match="no batch to evaluate"):
        evaluate(net, [])
    with pytest.raises(TalosError, match="batch 0: labels"):
        evaluate(net, [(x, y + 2)])


@pytest.mark.parametrize("steps", [np.uint8(3), np.uint64(3)])
def test_unsigned_steps(net, steps):
    assert finetune(net, loader(), method="nonlinear", steps=steps, progress=False).info["steps"] == 3
