"""``talos-fast merge`` and ``talos-fast evaluate``."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from safetensors.torch import save_file
from torch import nn

import talos_fast as talos
from talos_fast import writing
from talos_fast.along import require_parameters
from talos_fast.cli import options as o
from talos_fast.errors import TalosError
from talos_fast.evaluate import evaluate_along
from talos_fast.fingerprint import require_base
from talos_fast.merge import Evaluate
from talos_fast.merging import METHODS, check_options, combine
from talos_fast.models import Backbone, Classifier
from talos_fast.tasks import Task
from talos_fast.tasks import load as load_task
from talos_fast.tasks.base import check_distinct
from talos_fast.vector_file import require_free

app = typer.Typer()

Add = Annotated[list[Path] | None, typer.Option("--add", help="Task vector to add; repeatable.")]
Subtract = Annotated[list[Path] | None, typer.Option("--subtract", help="Task vector to subtract; repeatable.")]


def _vectors(add: list[Path] | None, subtract: list[Path] | None) -> list[talos.TaskVector]:
    added = [o.load_vector(path) for path in add or []]
    return added + [-o.load_vector(path) for path in subtract or []]


@app.command()
@o.with_run
def merge(
    run: o.Run,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and merge.json.")] = Path("merged"),
    add: Add = None,
    subtract: Subtract = None,
    onto: Annotated[
        Path | None,
        typer.Option(help="Encoder weights that merge wrote; for vectors of the pre-trained model, or of that edit."),
    ] = None,
    alpha: Annotated[str, typer.Option(help="Coefficient of the sum, or 'search'.")] = "1.0",
    weights: Annotated[list[float] | None, typer.Option(help="One per vector: of --add, then of --subtract.")] = None,
    method: Annotated[str, typer.Option(help=" | ".join(METHODS))] = "task_arithmetic",
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, NAME=VALUE; repeatable.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="For search: the task of each vector, in that order.")] = None,
    control: Annotated[Path | None, typer.Option(help="For search: the control task; makes it a negation.")] = None,
    control_floor: Annotated[
        float | None, typer.Option(help="Fraction of the control accuracy to keep; default 0.95.")
    ] = None,
    batch_size: o.BatchSize = 128,
) -> None:
    """Add task vectors to a model, or subtract them, and write the edited encoder."""
    writing.require_folder(out, "--out")
    require_free(out)
    coefficient = _coefficient(alpha, weights, data, control, control_floor)
    vectors, options = _vectors(add, subtract), _options(method, option or [])
    if not vectors:
        raise TalosError("no task vector: give --add or --subtract, once or more")
    for vector in vectors:
        require_parameters(vector, "merge")
    if coefficient is None:
        _require_one_goal(add, subtract, control, data)
    tasks = [load_task(path) for path in data or []]
    control_task = None if control is None else load_task(control)
    backbone, report = run.backbone(), dict[str, Any]()
    if coefficient is None:
        floor = {} if control_floor is None else {"control_floor": control_floor}
        _require_order(vectors, tasks)
        base, found, check_base = _search(
            backbone, onto, vectors, tasks, control_task, batch_size, method=method, **floor, **options
        )
        coefficient, report = found.alpha, {"search": found.to_json()}
        typer.echo(f"alpha {found.alpha:g}: {found.why}")
        for line in found.lines([task.name for task in tasks]):
            typer.echo(f"  {line}")
    else:
        base = Classifier(backbone.encoder, nn.Identity())
        check_base = _load_edit(base, onto, vectors)
    edited = talos.merge(
        base, vectors, alpha=coefficient, weights=weights, method=method, inplace=True, check_base=check_base, **options
    )
    assert isinstance(edited, Classifier)
    with writing.atomic(out / "model.safetensors") as temporary:
        save_file({name: t.contiguous().clone() for name, t in edited.encoder.state_dict().items()}, temporary)
    writing.write_json(
        out / "merge.json",
        {**run.source(onto), "alpha": coefficient, "weights": weights, "method": method, "options": options,
         "add": [str(path) for path in add or []], "subtract": [str(path) for path in subtract or []], **report},
    )  # fmt: skip
    count = f"{len(add or [])} added, {len(subtract or [])} subtracted"
    combined = f"({count})" if method == "task_arithmetic" else f"{method} of ({count})"
    typer.echo(f"{out / 'model.safetensors'}: base + {coefficient:g} × {combined}")


@app.command()
@o.with_run
def evaluate(
    run: o.Run,
    data: Annotated[list[Path], typer.Option(help="A task; repeatable.")],
    split: Annotated[str, typer.Option(help="train | validation | test")] = "test",
    weights: o.Weights = None,
    add: Add = None,
    subtract: Subtract = None,
    alpha: Annotated[float | None, typer.Option(help="Coefficient of --add and --subtract; default 1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the accuracies there, as JSON.")] = None,
    batch_size: o.BatchSize = 128,
) -> None:
    """Top-1 accuracy of a model, edited or not, on one or more tasks."""
    if split not in ("train", "validation", "test"):
        raise TalosError(f"--split {split}: choose train, validation or test")
    writing.require_file(out, "--out")
    vectors = _vectors(add, subtract)
    if not vectors:
        o.refuse("without --add or --subtract", {"--alpha": alpha})
    tasks = [load_task(path) for path in data]
    check_distinct(tasks)
    backbone = run.backbone()
    # Heads may be computed with the encoder, so they come before any edit.
    classifiers = [backbone.classifier(task) for task in tasks]
    check_base = _load_edit(classifiers[0], weights, vectors)
    vector = combine(vectors) if vectors else None
    if vector is not None and check_base:
        require_base(vector.base, classifiers[0], "the task vector")
    found = {}
    for task, classifier in zip(tasks, classifiers, strict=True):
        batches = backbone.batches(getattr(task, split), batch_size=batch_size)
        if vector is None:
            accuracy = talos.evaluate(classifier, batches, progress=not run.quiet)
        else:
            (accuracy,) = evaluate_along(classifier, vector, batches, [1.0 if alpha is None else alpha])
        found[task.name] = {"accuracy": accuracy.value, "correct": accuracy.correct, "total": accuracy.total}
        typer.echo(f"{task.name}: {accuracy}")
    if out is not None:
        writing.write_json(out, found)


def _options(method: str, given: list[str]) -> dict[str, Any]:
    """NAME=VALUE with a number or a word, of a method."""
    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise TalosError(f"--option {item}: give NAME=VALUE, such as density=0.2")
        try:
            found[name.replace("-", "_")] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise TalosError(f"--option {item}: {value!r} is neither a number nor a word") from error
    check_options(method, found)
    return found


def _number(value: Any) -> Any:
    """What YAML took for a word but is a number, such as 1e-1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _coefficient(
    alpha: str, weights: list[float] | None, data: list[Path] | None, control: Path | None, floor: float | None
) -> float | None:
    """The number that --alpha is, None for a search; refuses options that mean nothing to it."""
    if control is None:
        o.refuse("without --control", {"--control-floor": floor})
    if alpha == "search":
        o.refuse("with --alpha search, which finds one coefficient for all", {"--weights": weights})
        return None
    o.refuse("without --alpha search", {"--data": data, "--control": control})
    try:
        return float(alpha)
    except ValueError:
        raise TalosError(f"--alpha {alpha}: give a number, or 'search'") from None


def _require_one_goal(
    add: list[Path] | None, subtract: list[Path] | None, control: Path | None, data: list[Path] | None
) -> None:
    """Refuses a search without the task of each vector, or that would raise what is to be forgotten, or the reverse."""
    vectors, tasks = len([*(add or []), *(subtract or [])]), len(data or [])
    if tasks != vectors:
        raise TalosError(f"--alpha search needs the task of each vector: {tasks} --data for {vectors}")
    if add and subtract:
        raise TalosError(
            "--alpha search has one goal: give --add alone, or --subtract with --control; for both merge twice, the "
            "second time with --onto what the first wrote"
        )
    if subtract and control is None:
        raise TalosError("--alpha search of --subtract needs --control, a task that must not get worse")
    if add and control is not None:
        raise TalosError("--control goes with --subtract; --alpha search of --add has none")


def _require_order(vectors: list[talos.TaskVector], tasks: list[Task]) -> None:
    """Refuses tasks in another order than the vectors that were trained on them."""
    trained, given = [str(vector.info.get("task", "")) for vector in vectors], [task.name for task in tasks]
    if trained != given and sorted(trained) == sorted(given):
        raise TalosError(
            f"--data: {', '.join(given)}, but the vectors are of {', '.join(trained)}; give the same order"
        )


def _search(
    backbone: Backbone,
    onto: Path | None,
    vectors: list[talos.TaskVector],
    tasks: list[Task],
    control: Task | None,
    size: int,
    **options: Any,
) -> tuple[Classifier, talos.AlphaSearch, bool]:
    def evaluator(task: Task) -> tuple[Classifier, Evaluate]:
        classifier = backbone.classifier(task)
        batches = backbone.batches(task.validation, batch_size=size)
        return classifier, lambda _: talos.evaluate(classifier, batches)

    made = [evaluator(task) for task in tasks]
    keep = None if control is None else evaluator(control)[1]
    base = made[0][0]
    check_base = _load_edit(base, onto, vectors)
    found = talos.search_alpha(
        base, vectors, evaluate=[evaluate for _, evaluate in made], control=keep, check_base=check_base, **options
    )
    return base, found, check_base


def _load_edit(base: Classifier, onto: Path | None, vectors: list[talos.TaskVector]) -> bool:
    """Loads --onto; whether the vectors must be of that edit: they may also be of the model before it, as in a sum."""
    if onto is None:
        return True
    try:
        for vector in vectors[:1]:  # all are of one base, or cannot be combined
            require_base(vector.base, base, "the task vector")
    except TalosError:
        of_pretrained = False
    else:
        of_pretrained = True
    o.load_weights(base, onto)
    return not of_pretrained or any(vector.linearized for vector in vectors)
