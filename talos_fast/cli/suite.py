"""``talos-fast suite``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from talos_fast import writing
from talos_fast.cli import options as o
from talos_fast.cli.processes import is_first
from talos_fast.errors import TalosError
from talos_fast.study import MethodResult, Plan
from talos_fast.suite import RATES, Suite, choose_methods, run_suite
from talos_fast.tables import show_means
from talos_fast.tasks import Task, get_preset
from talos_fast.tasks import load as load_task

app = typer.Typer()

STEPS = 2000


@dataclass(frozen=True)
class _Given:
    """Tasks, and what they bring with them."""

    tasks: list[Task]
    control: Task | None
    batch_size: int = 128
    weight_decay: float = 0.1
    lr: float | None = None
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@app.command()
@o.with_run
def suite(
    run: o.Run,
    more: Annotated[list[Path] | None, typer.Argument(help="Further tasks.", metavar="[TASK]...")] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Folder or file of a task; more may follow it.")] = None,
    preset: Annotated[str | None, typer.Option(help="vision8 | language7: the paper's tasks, from --data.")] = None,
    data: Annotated[Path | None, typer.Option(help="For a preset: the folder with a folder for each task.")] = None,
    control: Annotated[Path | None, typer.Option(help="The control task; without one no task is negated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results; the same command goes on from there.")] = Path("suite"),
    methods: Annotated[list[str] | None, typer.Option(help="all (default), or names separated by commas.")] = None,
    merge: Annotated[list[str] | None, typer.Option(help="Post-hoc merging of nonlinear vectors; repeatable.")] = None,
    lr: Annotated[
        list[str] | None, typer.Option(help="Learning rate, RATE or METHOD=RATE; the best of several is taken.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a fine-tuning; default: the preset's, or 2000.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Inputs; default: the preset's, or 128.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: the preset's, or 0.1.")] = None,
    density: Annotated[float, typer.Option(help="Fraction that trains, for talos and lota.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Training inputs to calibrate on.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many validation inputs.")] = None,
    test_limit: Annotated[int | None, typer.Option(min=1, help="At most this many test inputs.")] = None,
) -> None:
    """Run a table: methods × tasks, fine-tuned, added and negated. Stopped in any way, the same command goes on.

    Processes that run the same command, by torchrun or each by itself, share the work.
    """
    writing.require_folder(out, "--out")
    chosen = choose_methods(methods or ["all"])
    given = _given([*(tasks or []), *(more or [])], preset, data, control, run.seed)
    defaults: dict[str, tuple[float, ...]] = {m: RATES[m] if given.lr is None else (given.lr,) for m in chosen}
    plan = Plan(
        learning_rates=_rates(lr or [], defaults), steps=steps or STEPS, density=density, samples=samples,
        batch_size=given.batch_size if batch_size is None else batch_size,
        weight_decay=given.weight_decay if weight_decay is None else weight_decay,
        limit=limit, test_limit=test_limit, seed=run.seed,
    )  # fmt: skip
    recipes = given.recipes if steps is None else {task: _shortened(r, steps) for task, r in given.recipes.items()}
    whole = Suite(given.tasks, given.control, plan, recipes, merge or [])
    kind, _, _ = run.place.partition(":")  # a run may go on, or be shared, on another of the machine's GPUs
    identity = {"pretrained": run.pretrained, "device": kind, "dtype": run.dtype}
    backbone, speaks = run.backbone(), is_first()
    with o.resumable(out):
        result = run_suite(
            backbone, whole, out, identity=identity, progress=speaks and not run.quiet,
            finished=(lambda so_far: typer.echo(_done(so_far.methods[-1]))) if speaks else None,
        )  # fmt: skip
    if not speaks:
        return
    show_means(result)
    typer.echo(f"{out / 'table.md'}, {out / 'report.json'}: the table; {out / 'cells'}: masks, vectors, every part")


def _done(row: MethodResult) -> str:
    rates = row.validation_by_lr
    if row.method in RATES and len(rates) > 1 and f"{row.lr:g}" == max(rates, key=float):
        larger = f"larger ones by --lr {row.method}=RATE and another --out"
        return f"{row.method}: done; {row.lr:g} is the largest rate tried, {larger}"
    return f"{row.method}: done"


def _given(paths: list[Path], preset: str | None, data: Path | None, control: Path | None, seed: int) -> _Given:
    if (preset is None) == (not paths):
        raise TalosError("give either --preset with --data, or --tasks")
    control_task = None if control is None else load_task(control)
    if preset is None:
        if data is not None:
            raise TalosError(f"--data {data} is the folder of a preset; give tasks with --tasks")
        return _Given([load_task(path) for path in paths], control_task)
    known = get_preset(preset)
    if data is None:
        raise TalosError(f"--preset {preset} needs --data, a folder with a folder for each of {', '.join(known.tasks)}")
    loaded = [known.task(name, data, seed) for name in known.tasks]
    control_task = control_task or known.task(known.control, data, seed)
    return _Given(loaded, control_task, known.batch_size, known.weight_decay, known.lr, known.recipes())


def _shortened(recipe: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The recipe with this many steps, and a warm-up that fits them."""
    kept = {key: value for key, value in recipe.items() if key != "epochs"}
    return {**kept, "steps": steps, **({"warmup": min(kept["warmup"], steps // 10)} if "warmup" in kept else {})}


def _rates(given: list[str], defaults: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """The learning rates of each method: those given for it, else those given for all, else the defaults."""
    found: dict[str, list[float]] = {}
    for item in given:
        method, _, rate = item.rpartition("=")
        try:
            found.setdefault(method, []).append(float(rate))
        except ValueError:
            raise TalosError(f"--lr {item}: give a number, or METHOD=NUMBER") from None
    if unknown := sorted(found.keys() - {"", *defaults}):
        raise TalosError(f"--lr {unknown[0]}=…: {unknown[0]!r} is not among the methods, {', '.join(defaults)}")
    return {m: tuple(sorted({*(found.get(m) or found.get("") or rates)})) for m, rates in defaults.items()}
