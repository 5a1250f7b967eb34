"""``talos-fast calibrate | finetune | merge | evaluate | …``: the functions, with the same names and defaults."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

import talos_fast as talos
from talos_fast import writing
from talos_fast.checkpoint import remove
from talos_fast.cli import options as o
from talos_fast.cli.edit import app as edit_app
from talos_fast.cli.inspect import app as inspect_app
from talos_fast.cli.processes import join, leave
from talos_fast.cli.profile import app as profile_app
from talos_fast.cli.suite import app as suite_app
from talos_fast.errors import needs
from talos_fast.evaluate import evaluate_along
from talos_fast.methods import METHODS, Compat
from talos_fast.ranks import Ranks
from talos_fast.recipe import Schedule
from talos_fast.restoring import restoring_parameters
from talos_fast.sensitivity.estimators import Estimator
from talos_fast.sensitivity.uses import Precision
from talos_fast.step import Amp
from talos_fast.tasks import load as load_task
from talos_fast.vector_file import require_free

app = typer.Typer(help=talos.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(edit_app)
app.add_typer(inspect_app)
app.add_typer(profile_app)
app.add_typer(suite_app)


def main() -> None:
    """The ``talos-fast`` program: bad input gets one line and exit code 2, never a traceback."""
    # Of torch's own rules for forward mode, which every linearized run reads.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is ", category=FutureWarning)
    try:
        app()
    except talos.TalosError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


def _version(on: bool) -> None:
    if on:
        typer.echo(f"talos-fast {talos.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Task-localized sparse fine-tuning and task arithmetic."""
    join(ctx)


@app.command()
@o.with_run
def calibrate(
    run: o.Run,
    data: o.Data,
    out: Annotated[Path, typer.Option(help="The mask, a .safetensors file.")] = Path("mask.safetensors"),
    weights: o.Weights = None,
    density: Annotated[float | None, typer.Option(help="Fraction that trains; default 0.1.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="1 - density, instead of it.")] = None,
    estimator: Annotated[Estimator, typer.Option(metavar="<str>", help=" | ".join(get_args(Estimator)))] = "fisher",
    rounds: Annotated[int, typer.Option(help="Rounds of scoring and pruning.")] = 4,
    damage: Annotated[float, typer.Option(help="What rejected entries are scaled by between rounds.")] = 0.1,
    samples_per_input: Annotated[int, typer.Option(help="Random probes per input.")] = 1,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of parameter names; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of parameter names; repeatable.")] = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the products of inputs and gradients.")] = "full",
    scores_device: Annotated[str | None, typer.Option(help="Where scores are kept; default: --device.")] = None,
    stability: Annotated[bool, typer.Option(help="Report how well the masks of two halves of the data agree.")] = True,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Keep finished rounds here, to go on from.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint that is there.")] = True,
    samples: Annotated[int, typer.Option(min=1, metavar="<n>", help="Training inputs scored per round.")] = 512,
    batch_size: o.BatchSize = 32,
) -> None:
    """Find the entries that a task is least sensitive to, and write them as a mask.

    Under torchrun the processes share each batch.
    """
    writing.require_file(out, "--out")
    writing.require_folder(checkpoint_dir, "--checkpoint-dir")
    task, backbone, classifier = run.classifier(data, weights)
    ranks = Ranks()
    batches = backbone.batches(
        task.train, batch_size=batch_size, seed=run.seed, limit=samples, rank=ranks.rank, world=ranks.world
    )
    with o.resumable(checkpoint_dir):
        mask = talos.calibrate(
            classifier, batches, density=density, sparsity=sparsity, estimator=estimator, rounds=rounds, damage=damage,
            samples_per_input=samples_per_input, include=include, exclude=exclude, precision=precision,
            scores_device=scores_device, stability=stability, checkpoint_dir=checkpoint_dir, resume=resume,
            seed=run.seed, progress=not run.quiet,
        )  # fmt: skip
    leave()
    if ranks.rank > 0:
        return
    mask.info |= {**run.source(weights), "task": task.name}
    mask.save(out)
    typer.echo(f"{out}: {mask}")


@app.command()
@o.with_run
def finetune(
    run: o.Run,
    data: o.Data,
    out: Annotated[Path, typer.Option(help="The task vector, a folder.")] = Path("task_vector"),
    weights: o.Weights = None,
    method: Annotated[str, typer.Option(help=" | ".join(METHODS))] = "talos",
    mask: Annotated[Path | None, typer.Option(help="talos: what calibrate wrote.")] = None,
    density: Annotated[float | None, typer.Option(help="lota: fraction that trains; default 0.1.")] = None,
    finetuned: Annotated[
        Path | None, typer.Option(help="lota: vector of a full fine-tuning; default: one is trained first.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="l-lora: rank of the adapters; default 16.")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="l-lora: adapters act times this / rank; default 32.")
    ] = None,
    compat: Annotated[Compat, typer.Option(help="paper, or as its released code computes it.")] = "paper",
    epochs: Annotated[int | None, typer.Option(help="Epochs of training, or give --steps; default 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default 1e-5, talos and l-lora 3e-4.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Weight decay of the entries that train.")] = 0.1,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps; default 500, or a tenth of the run.")] = None,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate, after the warm-up.")] = "cosine",
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    amp: Annotated[Amp, typer.Option(help="bf16 autocast; auto: on CUDA.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile, around forward and backward.")] = False,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Default: OUT/checkpoint, removed when done.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint that is there.")] = True,
    batch_size: o.BatchSize = 128,
) -> None:
    """Fine-tune on a task, and write the task vector. Interrupted, the same command goes on.

    Under torchrun the processes share each batch.
    """
    writing.require_folder(out, "--out")
    require_free(out)
    checkpoint = checkpoint_dir or out / "checkpoint"
    writing.require_folder(checkpoint, "--checkpoint-dir")
    o.require_mask(method, mask)
    selected = None if mask is None else talos.Mask.load(mask)
    full = None if finetuned is None else o.load_vector(finetuned)
    task, backbone, classifier = run.classifier(data, weights)
    ranks = Ranks()
    batches = backbone.batches(
        task.train, batch_size=batch_size, shuffle=True, seed=run.seed, rank=ranks.rank, world=ranks.world
    )
    with o.resumable(checkpoint), restoring_parameters(dict(classifier.named_parameters())):
        vector = talos.finetune(
            classifier, batches, method=method, mask=selected, density=density, finetuned=full, rank=rank,
            lora_alpha=lora_alpha, compat=compat, epochs=epochs, steps=steps, lr=lr, weight_decay=weight_decay,
            warmup=warmup, schedule=schedule, clip=clip or None, accumulate=accumulate, amp=amp, compile=compile,
            checkpoint_dir=checkpoint, resume=resume, seed=run.seed, progress=not run.quiet,
        )  # fmt: skip
    leave()
    if ranks.rank > 0:
        return
    vector.info |= {**run.source(weights), "task": task.name, "batch_size": batch_size}
    vector.save_pretrained(out)
    if checkpoint_dir is None:
        remove(checkpoint)
    validation = backbone.batches(task.validation, batch_size=batch_size)
    before, accuracy = evaluate_along(classifier, vector, validation, [0.0, 1.0])
    typer.echo(f"{out}: {vector}; validation accuracy {accuracy}, before {before.value:.2%}")


@dataclass(frozen=True)
class DemoRun(o.Run):
    """Of the model that comes with the package, unless another is named."""

    model: o.Model = "tiny"


@app.command()
@o.with_run
def demo(
    run: DemoRun,
    out: Annotated[Path, typer.Option(help="Folder for the table, the plots and the vectors.")] = Path("demo-output"),
    data: Annotated[list[Path] | None, typer.Option(help="A task; repeatable. Default: the embedded ones.")] = None,
    control: Annotated[Path | None, typer.Option(help="The control task of negation.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fine-tuning steps per task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Inputs per batch.")] = None,
    nonlinear_lr: Annotated[list[float] | None, typer.Option(help="Learning rates to choose from; repeatable.")] = None,
    talos_lr: Annotated[list[float] | None, typer.Option(help="As many, for talos; repeatable.")] = None,
) -> None:
    """Calibrate, fine-tune, add and negate every task; write the table, plots, masks and vectors."""
    with needs("demo"):
        from talos_fast.demo.run import run as run_demo

    writing.require_folder(out, "--out")
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": run.seed}
    rates = {"nonlinear": nonlinear_lr, "talos": talos_lr}
    tasks = None if data is None else [load_task(path) for path in data]
    control_task = None if control is None else load_task(control)
    run_demo(run.backbone(), tasks, control_task, out, given, rates, progress=not run.quiet)
