"""What `profile` found, as numbers and as text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from talos_fast.profiling.measure import COLUMNS, Timings
from talos_fast.profiling.work import Work

BASELINE = "nonlinear"


@dataclass(frozen=True)
class Row:
    """One method, measured and counted.

    Args:
        timings: seconds by phase.
        peak_bytes: highest memory above the model itself (gradients, moments, activations); None if it cannot be read.
        work: FLOPs and saved bytes.
        step_bytes: what the optimizer's step must move.
        trained: entries that move.
    """

    timings: Timings
    peak_bytes: int | None
    work: Work
    step_bytes: int
    trained: int


@dataclass(frozen=True)
class Profile:
    """A method beside full fine-tuning; ``print`` shows it.

    Args:
        rows: method -> measured and counted; "nonlinear" is full fine-tuning.
        about: machine, versions, batch and settings (JSON).
    """

    rows: Mapping[str, Row]
    about: Mapping[str, Any]

    def ratio(self, method: str, column: str = "total") -> float:
        """Time of ``method`` / time of full fine-tuning, median over the rounds.

        Args:
            method: a key of ``rows``.
            column: "fwd-bwd", "clip", "step", "clip+step" or "total".
        """
        return self.rows[method].timings.ratio(self.rows[BASELINE].timings, *COLUMNS[column])

    def to_json(self) -> dict[str, Any]:
        """Everything, for `json.dump`."""
        return {**self.about, "rows": {name: asdict(row) for name, row in self.rows.items()}}

    def __str__(self) -> str:
        lines = [self._heading(), "", _line("", *COLUMNS, "peak above model")]
        for name, row in self.rows.items():
            times = [f"{1e3 * row.timings.median(*phases):.2f} ms" for phases in COLUMNS.values()]
            lines.append(_line(name, *times, _mib(row.peak_bytes)))
        for name, row in self.rows.items():
            if name != BASELINE:
                ratios = [f"{self.ratio(name, column):.3f}" for column in COLUMNS]
                lines.append(_line(f"/ {BASELINE}", *ratios, _over(row.peak_bytes, self.rows[BASELINE].peak_bytes)))
        lines += [
            f"{name}: the host was busy for nearly all of fwd-bwd, which may be what was measured"
            for name, row in self.rows.items()
            if row.timings.host_was_busy
        ]
        return "\n".join([*lines, "", *(_counted(name, row) for name, row in self.rows.items())])

    def _heading(self) -> str:
        a = self.about
        precision = "bf16 autocast" if a["bf16"] else a["dtype"]
        return (
            f"{a['model']}, {a['model_bytes'] / 2**20:.1f} MiB, batch of {a['batch']}, {precision}; "
            f"{a['device_name']}, {a['threads']} threads, torch {a['torch']}; "
            f"medians of {a['rounds']} rounds, interleaved{', compiled' if a['compiled'] else ''}"
        )


def _line(name: str, *cells: str) -> str:
    return f"{name:14s}" + "".join(f"{cell:>12s}" for cell in cells[:-1]) + f"{cells[-1]:>19s}"


def _mib(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"


def _over(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.3f}" if part is not None and whole else ""


def _counted(name: str, row: Row) -> str:
    """The counted floor beside what was reached."""
    seconds = row.timings.median("step")
    step = f"step: {row.trained:,} entries, {row.step_bytes / 1e6:.2f} MB, {row.step_bytes / 1e9 / seconds:.1f} GB/s"
    work, elapsed = row.work, row.timings.median(*COLUMNS["fwd-bwd"])
    backward = f"{work.activation_gradients / 1e9:.3g} backward"
    if (weight := work.weight_gradients / 1e9) > 0:  # of a linearized model they are not told apart
        backward = f"{work.activation_gradients / 1e9:.3g} activation, {weight:.3g} weight gradients"
    if work.repeated:
        backward += f", {work.repeated / 1e9:.3g} of checkpoints again"
    return (
        f"{name} counted: {work.done / 1e9:.3g} GFLOP ({work.forward / 1e9:.3g} forward, {backward}), "
        f"with the selected rows only {work.floor / 1e9:.3g}: {work.floor / 1e9 / elapsed:.3g} GFLOP/s; "
        f"kept for backward {work.saved_bytes / 2**20:.1f} MiB\n{name} {step}"
    )
