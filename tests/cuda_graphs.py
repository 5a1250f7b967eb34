"""A step captured in a CUDA graph."""

from collections.abc import Callable

import torch


def captured(step: Callable[[], None], warmup: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of a step. It follows eager ones, on a side stream as torch advises, and is not taken itself."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
