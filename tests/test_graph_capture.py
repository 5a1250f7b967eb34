"""CUDA graphs, streams, devices and sizes: what of the Triton step only a GPU can show.

What is refused is refused on the host, so those tests run anywhere, with a capture that is pretended.
"""

import gc
import weakref

import pytest
import torch
from adam_cases import assert_unselected_equal, give_gradients, launches, masks, on_cpu, parameters, run
from cuda_graphs import captured
from torch.optim import AdamW

from talos_fast import MaskedAdam, TalosError


@pytest.fixture
def capturing(monkeypatch):
    """A switch that pretends a capture."""

    def switch(on: bool) -> None:
        monkeypatch.setattr("talos_fast.optim.launch.is_capturing", lambda: on)

    return switch


@pytest.fixture
def on_host(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr("talos_fast.optim.launch.ON_CPU", True)
        return "cpu"
    return "cuda"


def test_capture_needs_an_eager_step_before(on_host, capturing):
    params = parameters(place=on_host)
    optimizer = MaskedAdam(params, masks=masks())
    capturing(True)
    give_gradients(params, 0)
    with pytest.raises(TalosError, match="take an eager step before each capture"):
        optimizer.step()


def test_capture_needs_every_gradient(on_host, capturing):
    """But not those of frozen parameters, nor of those whose mask is empty."""
    named = [(f"p{n}", p) for n, p in enumerate(parameters(place=on_host))]
    params = [p for _, p in named]
    optimizer = MaskedAdam(named, masks={f"p{n}": mask for n, mask in enumerate(masks())})
    run(optimizer, params, range(1))
    capturing(True)
    params[4].grad = params[2].grad = None
    with pytest.raises(TalosError, match=r"parameter p4 of shape \(2, 3, 4\) has no gradient"):
        optimizer.step()
    params[4].requires_grad_(False)
    if on_host == "cpu":  # on a GPU nothing is being captured, so the launch would wait for a capture
        optimizer.step()


def test_a_parameter_that_joins_is_captured_after_its_first_step(on_host, capturing):
    params = parameters(place=on_host)
    optimizer = MaskedAdam(params, masks=masks())
    give_gradients(params, 0)
    late, params[4].grad = params[4].grad, None
    optimizer.step()
    params[4].grad = late
    optimizer.step()
    capturing(True)
    if on_host == "cpu":  # as above
        optimizer.step()


def refill(params, step: int) -> None:
    """New gradients in the old memory."""
    torch.manual_seed(100 + step)
    for p in params:
        p.grad.copy_(torch.randn(p.shape).to(p.device, p.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_replayed_step_is_the_eager_one(dtype, amsgrad):
    """With a learning rate that changes between replays, and eager steps on other gradients between them."""
    replayed, eager = parameters(dtype, "cuda"), parameters(dtype, "cuda")
    rates = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    optimizers = [
        MaskedAdam(params, lr=lr, masks=masks(), amsgrad=amsgrad, capturable=True)
        for params, lr in zip((replayed, eager), rates, strict=True)
    ]
    for params in (replayed, eager):
        give_gradients(params, 0)
    static = [p.grad for p in replayed]
    graph = captured(optimizers[0].step)  # takes one eager step; the capture itself takes none
    optimizers[1].step()
    for step in range(1, 7):
        for lr in rates:
            lr.fill_(1e-2 / step)
        if step == 3:
            run(optimizers[0], replayed, [step])
            for p, gradient in zip(replayed, static, strict=True):
                p.grad = gradient
        else:
            refill(replayed, step)
            graph.replay()
        run(optimizers[1], eager, [step])
        assert_unselected_equal(replayed, parameters(dtype), masks())
        for p, q in zip(replayed, eager, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(value, optimizers[1].state[q][key]) for key, value in optimizers[0].state[p].items())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["dropped", "built anew"])
def test_a_graph_keeps_the_tables_it_reads(how):
    """Launches that end after a capture stay alive: the graph still reads their tables."""
    params = parameters(place="cuda")
    params[4].requires_grad_(False)
    optimizer = MaskedAdam(params, masks=masks(), capturable=True)
    give_gradients(params, 0)
    late, params[4].grad = params[4].grad, None
    graph = captured(optimizer.step)
    kept = [weakref.ref(one) for one in launches(optimizer)]
    if how == "dropped":
        optimizer._launches.clear()
    else:
        params[4].grad = late
        optimizer.step()
    gc.collect()
    filler = [torch.full((64, 64), -1, dtype=torch.int64, device="cuda") for _ in range(64)]
    graph.replay()
    assert len(kept) == 1 and kept[0]() is not None and len(filler) == 64
    assert float(optimizer.state[params[0]]["step"]) == (2.0 if how == "dropped" else 3.0)


@pytest.mark.gpu
def test_an_eager_step_after_a_replay_reads_its_own_gradients():
    """On the addresses of the eager step before, which were not sent again."""
    params, plain = parameters(place="cuda"), parameters(place="cuda")
    optimizer, reference = (MaskedAdam(p, masks=masks(), capturable=True) for p in (params, plain))
    gradients = [[torch.randn(p.shape).to(p.device) for p in params] for _ in range(2)]

    def give(to, step: int) -> None:
        for p, gradient in zip(to, gradients[step], strict=True):
            p.grad = gradient

    give(params, 0)
    optimizer.step()
    give(params, 1)
    graph = captured(optimizer.step, warmup=0)
    graph.replay()
    give(params, 0)
    optimizer.step()
    for step in (0, 1, 0):
        give(plain, step)
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.gpu
def test_a_second_capture_needs_an_eager_step_between():
    params = parameters(place="cuda")
    optimizer = MaskedAdam(params, masks=masks(), capturable=True)
    give_gradients(params, 0)
    captured(optimizer.step)
    with pytest.raises(TalosError, match="take an eager step before each capture"):
        captured(optimizer.step, warmup=0)
    captured(optimizer.step).replay()
    assert float(optimizer.state[params[0]]["step"]) == 3.0


@pytest.mark.gpu
def test_capture_without_capturable_is_refused_in_torchs_words():
    params = parameters(place="cuda")
    optimizer = MaskedAdam(params, masks=masks())
    run(optimizer, params, range(1))
    with (
        pytest.raises(RuntimeError, match="param_groups' capturable is False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.gpu
def test_two_streams():
    """Two optimizers on two streams step as one after the other does."""
    streamed, serial = ([parameters(place="cuda") for _ in range(2)] for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for all_params, contexts in ((streamed, [torch.cuda.stream(s) for s in streams]), (serial, [None, None])):
        optimizers = [MaskedAdam(params, masks=masks()) for params in all_params]
        for step in range(10):
            for params, optimizer, context in zip(all_params, optimizers, contexts, strict=True):
                if context is None:
                    run(optimizer, params, [step])
                else:
                    with context:
                        run(optimizer, params, [step])
        torch.cuda.synchronize()
    for params, others in zip(streamed, serial, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.gpu
def test_a_group_of_two_devices_steps_on_both():
    here, there = parameters(place="cuda"), parameters()
    optimizer, reference = MaskedAdam([*here, *there], masks=masks() * 2), parameters()
    for step in range(2):
        give_gradients(here, step)
        give_gradients(there, step)
        optimizer.step()
    (one,) = launches(optimizer)
    assert all(member.parameter.is_cuda for member in one.members)
    run(MaskedAdam(reference, masks=masks()), reference, range(2))
    for p, q, r in zip(here, there, reference, strict=True):
        torch.testing.assert_close(on_cpu(p), on_cpu(r), rtol=1e-5, atol=1e-6)
        assert torch.equal(q, r)


@pytest.mark.gpu
def test_parameters_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    params = [torch.nn.Parameter(p.detach().to("cuda:1")) for p in parameters()]
    plain = parameters()
    run(MaskedAdam(params, masks=masks()), params, range(3))
    run(MaskedAdam(plain, masks=masks()), plain, range(3))
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(on_cpu(p), on_cpu(q), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 70_000
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    mask = torch.zeros(size, dtype=torch.bool)
    places = torch.tensor([0, 5, 65_536, 2**31 - 1, 2**31, 2**31 + 1, size - 1])
    mask[places] = True
    p = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    optimizer = MaskedAdam([p], lr=0.5, masks=[mask], weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach().count_nonzero().cpu(), torch.tensor(len(places)))
    q = torch.nn.Parameter(torch.zeros(len(places)))
    q.grad = torch.ones(len(places))
    AdamW([q], lr=0.5, weight_decay=0.0).step()
    assert torch.equal(on_cpu(p)[places], q.detach().to(torch.bfloat16))
