"""The kernels of calibration alone: squared per-sample gradients of a linear map, and the k-th smallest score.

The yardstick of the first is one GEMM of the same size, the summed weight gradient that a plain backward computes.
"""

import time
from collections.abc import Callable

import pytest
import torch
from measure import interleaved
from records import header
from torch import Tensor

from talos_fast.profiling.memory import Memory, above
from talos_fast.sensitivity import kth_smallest, select_extreme
from talos_fast.sensitivity.accumulate import (
    accumulate_squared_per_sample_,
    accumulate_squared_per_sample_reference,
)
from talos_fast.writing import write_json

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SAMPLES = 16
# (tokens, outs, ins): ViT-B/32, ViT-L/14, BERT-like, a pooled projection, a short decoder.
SHAPES = [(50, 768, 768), (50, 3072, 768), (128, 1024, 1024), (257, 1024, 1024), (1, 512, 768), (8, 768, 768)]
YARDSTICK = "torch: one summed GEMM, fp32"
SCORES = 10**8
SMOKE_SHAPES, SMOKE_SCORES = SHAPES[-2:], 10**6


def contenders(tokens: int, outs: int, ins: int, device: str) -> dict[str, Callable[[], object]]:
    inputs, grads = torch.randn(SAMPLES, tokens, ins, device=device), torch.randn(SAMPLES, tokens, outs, device=device)
    x, g = inputs.bfloat16(), grads.bfloat16()
    scores = torch.zeros(outs, ins, device=device)

    def summed(x: Tensor, g: Tensor) -> Callable[[], object]:
        return lambda: torch.mm(g.reshape(-1, outs).t(), x.reshape(-1, ins))

    accumulate = accumulate_squared_per_sample_
    return {
        YARDSTICK: summed(inputs, grads),
        "torch: bmm, square, sum, fp32": lambda: scores.add_(torch.bmm(grads.mT, inputs).square_().sum(0)),
        "torch: a GEMM and addcmul_ a sample": lambda: accumulate_squared_per_sample_reference(scores, inputs, grads),
        "talos_fast, fp32": lambda: accumulate(scores, inputs, grads),
        "torch: one summed GEMM, bfloat16": summed(x, g),
        "talos_fast, bfloat16": lambda: accumulate(scores, x, g),
    }


@pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}))
@pytest.mark.parametrize("device", DEVICES)
def test_accumulate(device: str, threads: int, request: pytest.FixtureRequest) -> None:
    if device == "cuda" and threads > 1:
        pytest.skip("the GPU does not mind the number of threads")
    option = request.config.option
    before, tables = torch.get_num_threads(), {}
    torch.set_num_threads(threads)
    try:
        for tokens, outs, ins in SMOKE_SHAPES if option.preset == "smoke" else SHAPES:
            torch.manual_seed(0)
            rows = interleaved(contenders(tokens, outs, ins, device), option.rounds, device)
            work = 2e-9 * SAMPLES * tokens * outs * ins
            print(f"\n{SAMPLES} samples of {tokens} tokens, {outs} x {ins}, {device}, {threads} threads")
            for name, row in rows.items():
                row |= {"gflops": work / row["median"], "of_summed": row["median"] / rows[YARDSTICK]["median"]}
                spread = f"{1e3 * row['min']:8.2f} … {1e3 * row['max']:8.2f}"
                print(f"  {name:36s} {1e3 * row['median']:8.2f} ms ({spread})  {row['gflops']:7.0f} GFLOP/s"
                      f"  {row['of_summed']:6.2f} of the summed GEMM")  # fmt: skip
            tables[f"{tokens},{outs},{ins}"] = rows
    finally:
        torch.set_num_threads(before)
    content = {"benchmark": "accumulate_squared_per_sample_", "samples": SAMPLES, "threads": threads, "rows": tables}
    path = option.results / f"squares_{device}_{threads}threads.json"
    write_json(path, header(device) | content)  # whose threads are those of the measurement


def peak_bytes(run: Callable[[], object]) -> int:
    """What the process holds at the most while it runs, beyond what it held before. Linux only."""
    memory = Memory(torch.device("cpu"))
    found = above(memory.held(), memory.peak(run))
    assert found is not None, "the system does not say"
    return found


def test_threshold(request: pytest.FixtureRequest) -> None:
    option = request.config.option
    count = SMOKE_SCORES if option.preset == "smoke" else SCORES
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        whole = torch.empty(count).normal_().mul_(4).exp_()  # log-normal, as sums of squares are
        scores = {f"p{n}": part for n, part in enumerate(whole.split(count // 8))}
        k = count // 10
        runs = {
            "torch.kthvalue of all in one tensor": lambda: whole.kthvalue(k),
            "talos_fast.sensitivity.kth_smallest": lambda: kth_smallest(scores, k),
            "talos_fast.sensitivity.select_extreme": lambda: select_extreme(scores, k),
        }
        assert kth_smallest(scores, k)[0] == float(whole.kthvalue(k).values)
        rows = interleaved(runs, min(3, option.rounds))
        for name, row in rows.items():
            row["bytes_a_score"] = peak_bytes(runs[name]) / count
            print(f"\n  {name:40s} {row['median']:6.3f} s ({row['min']:6.3f} … {row['max']:6.3f}) for {count:.0e}, "
                  f"{row['bytes_a_score']:5.2f} bytes a score", end="")  # fmt: skip
        rows["talos_fast.sensitivity.kth_smallest, ten times as many"] = ten_times(whole)
    finally:
        torch.set_num_threads(before)
    content = {"benchmark": "threshold", "scores": count, "k": k, "threads": 1, "rows": rows}
    path = option.results / "threshold_cpu_1threads.json"
    write_json(path, header("cpu") | content)


def ten_times(scores: Tensor) -> dict[str, float]:
    """Ten tensors of scores at once, held against a count of what is below the value found."""
    parts = {f"p{n}": scores * (1 + 0.1 * n) for n in range(10)}
    total = sum(part.numel() for part in parts.values())
    start = time.perf_counter()
    value, below = kth_smallest(parts, total // 10)
    seconds = time.perf_counter() - start
    counts = [[int(test(part, value).sum()) for part in parts.values()] for test in (torch.lt, torch.le)]
    assert below == sum(counts[0]) < total // 10 <= sum(counts[1])
    held = peak_bytes(lambda: kth_smallest(parts, total // 10)) / total
    print(f"\n  kth_smallest of {total:.0e}: {seconds:.3f} s, {held:.2f} bytes a score")
    return {"scores": total, "median": seconds, "bytes_a_score": held}
