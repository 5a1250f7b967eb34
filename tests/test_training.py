"""The embedded CLIP trained by MaskedAdam: with a full mask as by AdamW, with a TaLoS mask nowhere else."""

import functools
import json
import sys

import pytest
from conftest import HAS_GPU, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import training

PLACES = ["torch", "foreach", "cpp", *([] if HAS_GPU else ["interpreter"]), pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter takes a second or more for a step of the whole model. benchmarks/training.py takes 200 everywhere, and
# what came of them is in benchmarks/results/training_*.json.
STEPS = dict.fromkeys(training.BACKENDS, training.STEPS) | {"foreach": 50, "interpreter": 2}


@pytest.fixture(scope="module")
def problem() -> training.Problem:
    return training.problem()


@pytest.fixture(scope="module")
def rivals(problem):
    """Number of steps, where they are taken -> torch's AdamW."""
    return functools.cache(lambda steps, device: training.rivals(problem, steps, device))


@pytest.mark.parametrize("backend", PLACES)
def test_a_full_mask_trains_as_adamw(problem, rivals, backend):
    """In plain torch bit for bit; elsewhere as close as torch's own for-loop and fused AdamW are to each other."""
    found = training.with_a_full_mask(problem, backend, *rivals(STEPS[backend], training.device_of(backend)))
    assert found["by_triton"] == (len(list(problem.model.parameters())) if backend in ("interpreter", "cuda") else 0)
    assert found["distance"] < min(3 * found["distance_of_fused"], 0.05 * found["way"])
    if backend == "torch":
        assert found["max_difference"] == 0 and found["losses"] == found["losses_of_adamw"]
    if STEPS[backend] == training.STEPS:
        assert sum(found["losses"][-50:]) < 0.7 * sum(found["losses"][:50])


@pytest.mark.parametrize("backend", PLACES)
def test_a_talos_mask_moves_nothing_else(problem, backend):
    found = training.with_a_talos_mask(problem, backend, STEPS[backend])
    assert (found["by_triton"] > 0) == (backend in ("interpreter", "cuda"))
    assert found["others_changed"] == 0
    assert found["moved"] > 0.9 * found["selected"]


@pytest.mark.parametrize("backend", ["torch", "foreach", "cpp", "interpreter"])
def test_the_committed_runs_took_all_steps(backend):
    content = json.loads((training.RESULTS / f"training_{backend}.json").read_text())
    full, sparse = content["full_mask"], content["talos_mask"]
    assert content["steps"] == len(full["losses"]) == len(sparse["losses"]) == training.STEPS
    assert full["distance"] < min(3 * full["distance_of_fused"], 0.05 * full["way"])
    assert sparse["others_changed"] == 0 and sparse["moved"] > 0.9 * sparse["selected"]
    assert (full["by_triton"] == content["tensors"]) == (sparse["by_triton"] > 0) == (backend == "interpreter")
