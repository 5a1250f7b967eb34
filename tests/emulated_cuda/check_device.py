"""What the emulated device must show, or the tests on it show nothing; run by test_emulated_cuda.py."""

import pytest
import torch


def test_work_runs_as_late_as_it_may():
    source = torch.zeros(4).pin_memory()
    there = source.to("cuda", non_blocking=True)
    source.fill_(1.0)  # too early: nobody has waited
    assert there.cpu().tolist() == [1.0] * 4
    back = torch.zeros(4).pin_memory()
    back.copy_(there, non_blocking=True)
    assert back.tolist() == [0.0] * 4
    torch.cuda.synchronize()
    assert back.tolist() == [1.0] * 4


def test_a_stream_that_does_not_wait_reads_too_early():
    seen = []
    for waits in (False, True):
        there, stream = torch.zeros(2, device="cuda"), torch.cuda.Stream()
        torch.cuda.synchronize()
        there.add_(1.0)
        if waits:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            seen.append((there * 1.0).tolist())
    assert seen == [[0.0, 0.0], [1.0, 1.0]]


def test_an_event_is_not_there_at_once():
    event = torch.cuda.Event()
    torch.ones(2, device="cuda").add_(1.0)
    event.record()
    assert not event.query()
    assert event.query()


def test_memory_is_handed_on_while_its_old_content_is_still_to_be_read():
    first = torch.full((1000,), 2.0, device="cuda")
    address, doubled = first.data_ptr(), first * 2
    del first
    second = torch.full((1000,), 5.0, device="cuda")
    assert second.data_ptr() == address
    assert doubled.sum() == 4000 and second.sum() == 5000


def test_what_nobody_wrote_is_nan():
    torch.cuda.empty_cache()
    assert torch.zeros(1, device="cuda").new_empty(3 << 20).isnan().all()


def test_a_number_of_the_host_counts_as_it_was_at_the_launch():
    number, there = torch.tensor(2.0), torch.ones(3, device="cuda")
    there.mul_(number)
    number.fill_(7.0)
    assert there.tolist() == [2.0] * 3


def test_a_graph_replays_and_nothing_runs_while_it_is_captured():
    x, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        x.add_(1.0)
    assert x.tolist() == [1.0, 1.0]
    for expected in (2.0, 4.0):
        graph.replay()
        assert y.tolist() == [expected] * 2


@pytest.mark.parametrize("waits", [torch.Tensor.item, torch.Tensor.cpu, torch.nonzero])
def test_a_capture_refuses_to_wait(waits):
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        waits(x * 2)
    torch.cuda.synchronize()


def test_waits_can_be_made_errors():
    x = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operator", [torch.add, torch.mv, torch.Tensor.add_])
def test_tensors_of_two_devices_do_not_mix(operator):
    with pytest.raises(RuntimeError, match="same device"):
        operator(torch.ones(2, 2, device="cuda"), torch.ones(2))


def test_random_numbers_are_the_generators():
    drawn = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        drawn.append(torch.rand(4, device="cuda").tolist())
        torch.rand(3)  # of the CPU's generator
    assert drawn[0] == drawn[1] != drawn[2]
