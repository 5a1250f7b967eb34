"""What a profile says: known times and counts as ratios and text, and what it is about."""

from test_profiling import Net, batches

import talos_fast as talos
from talos_fast.profiling.iteration import PHASES
from talos_fast.profiling.measure import Timings
from talos_fast.profiling.result import Profile, Row
from talos_fast.profiling.work import Work

ABOUT = {
    "bf16": False, "dtype": "float32", "model": "Net", "model_bytes": 2**20, "batch": 4, "device_name": "cpu",
    "threads": 1, "torch": "2", "rounds": 1, "compiled": False,
}  # fmt: skip


def row(peak: int, *times: float) -> Row:
    timings = Timings({phase: [seconds] for phase, seconds in zip(PHASES, times, strict=True)})
    return Row(timings, peak, Work(10, 5, 5, 1, 2**20, repeated=2), 4 * 10**9, 7)


def test_known_figures_as_ratios_and_text():
    found = Profile({"nonlinear": row(4 * 2**20, 4.0, 1.0, 2.0, 1.0), "talos": row(2**20, 2.0, 0.5, 0.5, 1.0)}, ABOUT)
    assert found.ratio("talos", "fwd-bwd") == 0.6 and found.ratio("talos") == 0.5
    ratios = next(line for line in str(found).splitlines() if line.startswith("/ nonlinear"))
    assert ratios.split()[2:] == ["0.600", "0.500", "0.250", "0.333", "0.500", "0.250"]
    assert "5000.00 ms" in str(found) and "host was busy" not in str(found)
    assert "talos step: 7 entries, 4000.00 MB, 8.0 GB/s" in str(found)
    assert "5e-09 activation, 5e-09 weight gradients, 2e-09 of checkpoints again)" in str(found)
    assert "with the selected rows only 1.6e-08: 5.33e-09 GFLOP/s; kept for backward 1.0 MiB" in str(found)


def test_a_busy_host_is_said():
    timings = Timings({phase: [1.0] for phase in PHASES}, host=[0.95])
    found = Profile(
        {"nonlinear": row(1, 1.0, 1.0, 1.0, 1.0), "talos": Row(timings, None, Work(1, 1, 1, 1, 1), 1, 1)}, ABOUT
    )
    said = [line.split(":")[0] for line in str(found).splitlines() if "the host was busy for nearly all" in line]
    assert said == ["talos"] and "not measured" in str(found)


def test_what_a_profile_is_about():
    model = Net()
    about = talos.profile(model, batches(), method="nonlinear", rounds=1, warmup=0, clip=None).to_json()
    assert about["clip"] is None and about["dtype"] == "float32" and about["bf16"] is False
    assert about["model_bytes"] == sum(tensor.nbytes for tensor in model.state_dict().values())
