"""T5-Large at its real size, random weights, one text: one step of each method, and the memory that it takes.

    python benchmarks/t5_large_step.py                   # writes results/t5_large_step.json, one method after another
    python benchmarks/t5_large_step.py --methods lota    # only these; the other rows stay

A step is forward, backward and update as `finetune` runs them, in fp32; the vector at the end is not made. LoTA's is
that of its masked run: the first one is a nonlinear one. Each method runs in a process of its own; one that needs more
memory than is free is not started, and says so.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from contenders import contender, in_own_process
from measure import RESULTS
from records import stamp
from workloads import LARGE_T5, build, bytes_free

from talos_fast import Mask
from talos_fast.environment import environment
from talos_fast.methods import METHODS
from talos_fast.profiling.memory import Memory, above
from talos_fast.writing import write_json

PATH = RESULTS / "t5_large_step.json"
GIB = 2**30
# Known before the first run: parameters are 2.75 GiB, and as much their gradients, each of two moments, and for
# linearized the origin and the direction. The rest is masks, activations and the libraries.
NEEDED = {"nonlinear": 13, "linearized": 15, "l-lora": 7, "lota": 8, "talos": 7}


def one_step(model: str, method: str) -> dict[str, Any]:
    """Builds the model and the method, takes the step, and says how much memory this process held meanwhile.

    Returns:
        ``peak_bytes`` in all, ``above_bytes`` above the model and its mask, and whether ``everything_moved`` that
        trains: each tensor has another sum than before.
    """
    torch.set_num_threads(1)
    workload = build(model, 1, torch.device("cpu"))
    unused = {name: Mask({}) for name in ("talos", "lota") if name != method}
    workload, memory = replace(workload, **unused), Memory(torch.device("cpu"))
    before = memory.held()

    def step() -> bool:
        iteration = contender(workload, method, "eager", bf16=False)
        trained = iteration.setup.trained.values()
        start = [float(p.detach().abs().sum(dtype=torch.float64)) for p in trained]
        iteration.prepare()
        iteration.run(lambda: None)
        return all(
            float(p.detach().abs().sum(dtype=torch.float64)) != total for p, total in zip(trained, start, strict=True)
        )

    found: list[bool] = []
    peak = memory.peak(lambda: found.append(step()))
    facts = {key: workload.about[key] for key in ("inputs", "parameters")}
    return {**facts, "peak_bytes": peak, "above_bytes": above(before, peak), "everything_moved": found[0]}


def measure(model: str, method: str) -> dict[str, Any]:
    """A row: what `one_step` found in a new process, or why it was not started."""
    free = bytes_free(torch.device("cpu"))
    if model == "T5-Large" and free is not None and free < NEEDED[method] * GIB:
        return {"missing": f"needs about {NEEDED[method]} GiB, {free / GIB:.1f} GiB were free"}
    return in_own_process(one_step, model, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    rows = json.loads(PATH.read_text())["rows"] if PATH.is_file() else {}
    for method in arguments.methods:
        row = measure("T5-Large", method)
        print(method, row.get("missing") or f"{row['peak_bytes'] / GIB:.2f} GiB in all", flush=True)
        if "missing" not in row or method not in rows:
            rows[method] = row | stamp()
            about = {"benchmark": "t5_large_step", **environment(torch.device("cpu")), "config": LARGE_T5}
            write_json(PATH, about | {"rows": rows})


if __name__ == "__main__":
    main()
