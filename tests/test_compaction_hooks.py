"""compact_gradients: how long its hooks live, what copies and checkpoints know of it, and what it refuses."""

import copy
import gc
import pickle

import pytest
import torch
from compaction_cases import Net, assert_same, masks, pair
from torch import nn

from talos_fast import Mask, MaskedAdam, TalosError
from talos_fast.forward import default_forward
from talos_fast.methods import Options, Request
from talos_fast.methods.masked import masked
from talos_fast.optim.compact_gradient import CompactGradient


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


def test_a_method_compacts_within_its_steps_only():
    net, x = nn.Linear(64, 64), torch.randn(5, 64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[3, 5:9] = True
    setup = masked(Request(net, default_forward, 1e-3, 0.0, Options(), None), Mask({"weight": mask}))
    with setup.around():
        net(x).square().sum().backward()
    net.weight.grad = None
    expected = torch.autograd.grad(net(x).square().sum(), net.weight)[0]
    net(x).square().sum().backward()
    assert net.weight.grad.shape == (64, 64)
    torch.testing.assert_close(net.weight.grad, expected)


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
