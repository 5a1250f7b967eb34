"""compact_gradients: the same training with gradients kept only where selected, and the memory that this frees."""

import copy
import gc
import itertools
import pickle

import pytest
import torch
from torch import nn

from talos_fast import MaskedAdam, TalosError
from talos_fast.optim.compact_gradient import CompactGradient

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A channels_last convolution, linear maps of which one is used twice, and a head without a mask."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.twice, self.frozen, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.to(dtype)

    def loss(self, batch: int = 0) -> torch.Tensor:
        x = X.roll(batch, 0).to(self.conv.weight.dtype)
        hidden = self.conv(x).mean((2, 3))
        hidden = self.twice(self.twice(hidden).tanh()).tanh() + self.frozen(hidden)
        return self.head(hidden).square().mean() * (batch + 1)


def masks(net: Net) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    names = ("conv.weight", "twice.weight", "twice.bias", "frozen.weight")
    chosen = {name: torch.rand(net.get_parameter(name).shape) < 0.3 for name in names}
    chosen["frozen.weight"][:] = False
    return chosen


def pair(norm="selected", dtype=torch.float32, accumulate=1, **kwargs):
    """A net whose optimizer compacts, and its twin whose optimizer does not."""
    nets = Net(dtype), Net(dtype)
    optimizers = [MaskedAdam(net.named_parameters(), lr=0.05, masks=masks(net), **kwargs) for net in nets]
    optimizers[0].compact_gradients(norm=norm, accumulate=accumulate)
    return nets, optimizers


def assert_same(nets) -> None:
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_the_selected_entries(dtype):
    nets, _ = pair(dtype=dtype)
    for batch in range(3):
        before = {n: None if p.grad is None else p.grad.clone() for n, p in nets[1].named_parameters()}
        for net in nets:
            net.loss(batch).backward()
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            mask = masks(nets[0]).get(name)
            if mask is None:
                assert torch.equal(p.grad, q.grad)
                continue
            order = (0, 2, 3, 1) if p.dim() == 4 else range(p.dim())
            assert isinstance(p.grad, CompactGradient) and p.grad.shape == p.shape
            want = q.grad.permute(*order)[mask.permute(*order)]
            assert p.grad.values.dtype is torch.promote_types(dtype, torch.float32)
            if dtype is not torch.bfloat16:
                assert torch.equal(p.grad.values, want)
            elif before[name] is None:  # from there on the sums are fp32, not bf16
                assert torch.equal(p.grad.values, want.float())


@pytest.mark.parametrize("entries", ["all", "selected", None])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [None, False, True])
def test_training_is_the_same(entries, set_to_none, fused):
    nets, optimizers = pair(norm=entries or "selected", fused=fused)
    for batch in range(4):
        norms = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.loss(batch).backward()
            if entries:
                norms.append(optimizer.clip_grad_norm_(0.05, entries))
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        if entries:
            torch.testing.assert_close(*norms)
    assert_same(nets)


@pytest.mark.parametrize("entries", ["all", "selected"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_accumulation_clipping_and_a_grad_scaler_together(fused, unscale, entries):
    nets, optimizers = pair(norm=entries, accumulate=3, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in nets]
    for step in range(4):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            for batch in range(3):
                factor = float("inf") if step == 1 and batch == 2 else 1.0
                scaler.scale(net.loss(batch) * factor / 3).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if unscale or fused:
                optimizer.clip_grad_norm_(0.05, entries)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == [1024.0, 512.0, 512.0, 1024.0][step]
    assert_same(nets)


@pytest.mark.parametrize("norm", ["all", "selected"])
def test_torchs_own_clipping_takes_the_norm_that_is_kept(norm):
    nets, optimizers = pair(norm=norm)
    for net in nets:
        net.loss().backward()
    norms = [torch.nn.utils.clip_grad_norm_(nets[0].parameters(), 0.05), optimizers[1].clip_grad_norm_(0.05, norm)]
    torch.testing.assert_close(*norms)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(nets)


def test_the_norm_over_all_entries_of_a_sum_is_refused():
    (net, _), (optimizer, _) = pair(norm="all")
    net.loss().backward()
    net.loss(1).backward()
    with pytest.raises(TalosError, match="sum of 2 backward passes, whose norm over all entries is not known"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.clip_grad_norm_(1.0, "selected")
    optimizer.zero_grad(set_to_none=False)
    net.loss().backward()
    optimizer.clip_grad_norm_(1.0)
    (net, _), (optimizer, _) = pair(norm="selected")
    net.loss().backward()
    with pytest.raises(TalosError, match="pass norm='all' to compact_gradients"):
        optimizer.clip_grad_norm_(1.0)


def test_what_has_only_selected_entries_refuses_the_rest():
    (net, _), _ = pair()
    net.loss().backward()
    grad = net.conv.weight.grad
    assert repr(grad).startswith(f"CompactGradient({len(grad.values)} of {grad.numel()} entries")
    for use in (lambda: grad + 1, lambda: grad.sum(), lambda: grad.mul_(torch.ones(grad.shape)), grad.clone):
        with pytest.raises(TalosError, match="compacted gradient, which has its selected entries only"):
            use()


def test_hooks_end_with_their_handle_and_with_their_optimizer():
    net = Net()
    optimizer = MaskedAdam(net.named_parameters(), masks=masks(net))
    handle = optimizer.compact_gradients()
    handle.remove()
    net.loss().backward()
    assert not any(isinstance(p.grad, CompactGradient) for p in net.parameters())
    optimizer.compact_gradients()
    net.loss().backward()  # what was dense is compacted with what comes
    assert isinstance(net.conv.weight.grad, CompactGradient)
    net.zero_grad()
    del optimizer, handle
    gc.collect()
    net.loss().backward()
    assert not any(isinstance(p.grad, CompactGradient) for p in net.parameters())


def test_dense_gradients_from_before_are_kept():
    nets, optimizers = pair()
    optimizers[0]._compaction.remove()
    for net in nets:
        net.loss().backward()
    optimizers[0].compact_gradients()
    for net, optimizer in zip(nets, optimizers, strict=True):
        net.loss(1).backward()
        optimizer.step()
    assert_same(nets)


def test_two_optimizers_on_one_parameter_are_told_apart():
    net = Net()
    first, second = (MaskedAdam(net.named_parameters(), masks=masks(net)) for _ in range(2))
    first.compact_gradients()
    net.loss().backward()
    with pytest.raises(TalosError, match="compacted by another optimizer"):
        second.step()
    second.compact_gradients()
    with pytest.raises(TalosError, match="compacted by another optimizer"):
        net.loss().backward()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_train_densely_until_asked_to_compact(clone):
    (net, _), (optimizer, _) = pair()
    net.loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    twin, twins_optimizer = clone((net, optimizer))
    twin.loss().backward()
    assert not isinstance(twin.conv.weight.grad, CompactGradient)
    twin.zero_grad()
    twins_optimizer.compact_gradients()
    for n, o in ((net, optimizer), (twin, twins_optimizer)):
        n.loss(1).backward()
        assert isinstance(n.conv.weight.grad, CompactGradient)
        o.step()
    assert_same((net, twin))


def test_a_state_dict_knows_nothing_of_it():
    nets, optimizers = pair()
    for net, optimizer in zip(nets, optimizers, strict=True):
        net.loss().backward()
        optimizer.step()
    saved, plain = (o.state_dict() for o in optimizers)
    assert saved["param_groups"] == plain["param_groups"] and saved["state"].keys() == plain["state"].keys()
    optimizers[0].load_state_dict(copy.deepcopy(plain))
    for net, optimizer in zip(nets, optimizers, strict=True):
        optimizer.zero_grad()
        net.loss(1).backward()
        optimizer.step()
    assert_same(nets)


def test_bad_arguments_and_sparse_gradients():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = MaskedAdam(table.parameters(), masks=[torch.rand(10, 4) < 0.5])
    with pytest.raises(TalosError, match="norm='some': choose 'all' or 'selected'"):
        optimizer.compact_gradients(norm="some")
    optimizer.compact_gradients()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_distributed_data_parallel_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(4, 4))
        optimizer = MaskedAdam(net.parameters(), masks=[torch.rand(4, 4) < 0.5, torch.ones(4, dtype=torch.bool)])
        optimizer.compact_gradients()
        wrapped = DistributedDataParallel(net)
        with optimizer.selected_rows(), pytest.raises(TalosError, match="not under DistributedDataParallel"):
            wrapped(torch.ones(2, 4))
        with pytest.raises(TalosError, match="DistributedDataParallel has to"):
            wrapped(torch.ones(2, 4)).sum().backward()
    finally:
        dist.destroy_process_group()


def peak_bytes(run) -> int:
    """Of what torch allocates on the CPU while it runs, the most that lived at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def test_dense_gradients_never_coexist():
    layers, width = 8, 256
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    mask = torch.zeros(width, width, dtype=torch.bool)
    mask[: width // 2] = torch.rand(width // 2, width) < 0.2
    optimizer = MaskedAdam(net.parameters(), masks=[mask] * layers)
    weight, kept, x = 4 * width**2, 4 * int(mask.sum()), torch.randn(2, width)

    def backward() -> None:
        net(x).square().mean().backward()
        optimizer.zero_grad()

    def on_rows() -> None:
        with optimizer.selected_rows():
            backward()

    slack = weight // 8  # activations
    assert layers * weight <= peak_bytes(backward) <= layers * weight + slack
    optimizer.compact_gradients()
    assert peak_bytes(backward) <= layers * kept + weight + slack
    assert peak_bytes(on_rows) <= layers * kept + weight // 2 + slack
