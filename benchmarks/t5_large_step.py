"""T5-Large at its real size, random weights: one step of `finetune` by each method, and the memory that it takes.

    python benchmarks/t5_large_step.py                   # writes results/t5_large_step.json, one method after another
    python benchmarks/t5_large_step.py --methods lota    # only these; the other rows stay

Each method runs in a process of its own; a method that needs more memory than is free is not started, and says so.
"""

import argparse
import json
import math
import multiprocessing
import resource
from typing import Any

import torch
from measure import RESULTS, machine
from workloads import LARGE_T5, SPECS, bytes_free, talos_mask

from talos_fast import finetune
from talos_fast.methods import METHODS
from talos_fast.storage import write_json

PATH = RESULTS / "t5_large_step.json"
TOKENS = 16
GIB = 2**30
# GiB at the peak, as far as is known before the first run: parameters 2.75, and as much for each of their gradients,
# two moments, the start, a copy to go back to (lota), tangents (linearized).
NEEDED = {"nonlinear": 15, "linearized": 18, "l-lora": 7, "lota": 18, "talos": 8}


def one_step(method: str, tiny: bool) -> dict[str, Any]:
    """Builds the model, takes the step, and says what came of it and the most memory that this process held."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = SPECS["smoke-T5" if tiny else "T5-Large"]
    task: Any = spec.task
    model, batch, inputs = task(spec.encoder(), 1, tokens=TOKENS)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    options = {"mask": talos_mask(shapes, torch.Generator().manual_seed(1))} if method == "talos" else {}
    vector = finetune(model, [batch], method=method, steps=1, lr=1e-4, clip=None, progress=False, **options)
    return {
        "inputs": inputs, "parameters": sum(p.numel() for p in model.parameters()), "moved": vector.nnz,
        "loss": vector.info["last_loss"], "finite": math.isfinite(vector.norm()),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def measure(method: str, tiny: bool = False) -> dict[str, Any]:
    """A row: what `one_step` found in a new process, or why it was not started."""
    free = bytes_free(torch.device("cpu"))
    if not tiny and free is not None and free < NEEDED[method] * GIB:
        return {"missing": f"needs about {NEEDED[method]} GiB, {free / GIB:.1f} GiB were free"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(one_step, (method, tiny))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tiny", action="store_true", help="a T5 of a few thousand parameters; writes nothing")
    arguments = parser.parse_args()
    rows = json.loads(PATH.read_text())["rows"] if PATH.is_file() and not arguments.tiny else {}
    for method in arguments.methods:
        row = measure(method, arguments.tiny)
        print(method, row.get("missing") or f"{row['peak_bytes'] / GIB:.2f} GiB, {row['moved']:,} entries moved")
        if "missing" in row and "peak_bytes" in rows.get(method, {}):
            continue
        rows[method] = row
        if not arguments.tiny:
            write_json(PATH, {"benchmark": "t5_large_step", **machine(), "config": LARGE_T5, "rows": rows})


if __name__ == "__main__":
    main()
