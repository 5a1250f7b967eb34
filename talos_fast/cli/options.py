"""The options that several commands share, and what they stand for."""

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from talos_fast import models
from talos_fast.arguments import checked_seed
from talos_fast.cli.processes import is_first
from talos_fast.errors import TalosError, brief
from talos_fast.fingerprint import read_checkpoint
from talos_fast.models import Backbone, Classifier
from talos_fast.task_vector import TaskVector
from talos_fast.tasks import Task
from talos_fast.tasks import load as load_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Loader(yaml.SafeLoader):
    """Takes true and false for truth values, as YAML 1.2 does, and not off, which is a word of ``--amp``."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":bool")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the values of a YAML file the defaults of this command; flags still win."""
    if path is None:
        return None
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TalosError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise TalosError(f"{path}: expected a mapping of option names to values, found {type(content).__name__}")
    options = {option.name: option for option in ctx.command.params if option.name != "config"}
    given = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(given.keys() - options.keys()):
        known = ", ".join(sorted(str(name) for name in options))
        raise TalosError(f"{path}: {ctx.command.name} has no option {unknown[0]!r}; it has {known}")
    for name, value in given.items():
        option = options[name]
        many = option.multiple or option.nargs == -1
        truths = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, bool)]
        if truths and not getattr(option, "is_flag", False):
            raise TalosError(f"{path}: {name} takes a value, found {str(truths[0]).lower()}; put a word in quotes")
        if many and not isinstance(value, list | None):
            given[name] = [value]  # or the letters of a word would be taken for its items
        elif isinstance(value, dict) or (isinstance(value, list) and not many):
            raise TalosError(f"{path}: {name} takes one value, found {value}")
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


def _log(on: bool) -> bool:
    if on:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    return on


def _common(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model and run", **more)


Model = Annotated[str, _common("open_clip:NAME, timm:NAME, hf:DIR, t5:DIR, or tiny; prefixes may be left out.")]


@dataclass(frozen=True)
class Run:
    """The options of every command that loads a model: which, where, and how much the command says."""

    model: Model
    pretrained: Annotated[str | None, _common("open_clip tag, timm's 'hub', or a file; else random weights.")] = None
    device: Annotated[str, _common("auto (cuda where there is one), cpu, cuda or cuda:NUMBER.")] = "auto"
    dtype: Annotated[str, _common(" | ".join(DTYPES))] = "float32"
    seed: Annotated[int, _common("Of everything random.")] = 0
    config: Annotated[
        Path | None, _common("YAML file of options of this command; flags win.", callback=read_config, is_eager=True)
    ] = None
    quiet: Annotated[bool, _common("No progress bars.", "--quiet", "-q")] = False
    verbose: Annotated[bool, _common("Log what is done, and why.", "--verbose", "-v", callback=_log)] = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TalosError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        checked_seed("seed", self.seed)

    @property
    def place(self) -> str:
        """The device's name; what ``auto`` stands for here."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def source(self, weights: Path | None) -> dict[str, str | None]:
        """Which weights a result came from, for the result's own file."""
        edited = {} if weights is None else {"encoder_weights": str(weights)}
        return {"model": self.model, "pretrained": self.pretrained, **edited}

    def backbone(self) -> Backbone:
        """The model, or `TalosError`."""
        torch.manual_seed(self.seed)  # of random weights: the next command must find the same base
        return models.load(self.model, pretrained=self.pretrained, device=self.place, dtype=DTYPES[self.dtype])

    def classifier(self, data: Path, weights: Path | None) -> tuple[Task, Backbone, Classifier]:
        """A task, the model, and its classifier for the task with the encoder's ``weights``, or `TalosError`."""
        task, backbone = load_task(data), self.backbone()
        classifier = backbone.classifier(task)
        load_weights(classifier, weights)
        return task, backbone, classifier


def with_run(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its parameter ``run``, a `Run`, as options of its own.

    typer makes an option of each parameter of a function, and knows nothing of options that belong together.
    """
    own = inspect.signature(command).parameters
    run = own["run"].annotation
    shared = inspect.signature(run).parameters

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        command(run=run(**{name: given.pop(name) for name in shared}), **given)

    parameters = {**shared, **{name: parameter for name, parameter in own.items() if name != "run"}}
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    vars(flat)["__signature__"] = inspect.Signature(keywords)
    return flat


Weights = Annotated[
    Path | None, typer.Option(help="Encoder weights that merge wrote, under the pre-trained model's heads.")
]
Data = Annotated[
    Path, typer.Option(help="Folder of train/CLASS/*.png files, .npz, .jsonl(.gz), hub:NAME@COMMIT, demo:NAME.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="<n>", help="Inputs per batch.")]


def require_mask(method: str, mask: Path | None) -> None:
    """Refuses the method that needs a mask without one, before anything is loaded."""
    if method == "talos" and mask is None:
        raise TalosError("--method talos needs --mask; write one with: talos-fast calibrate … --out mask.safetensors")


def refuse(reason: str, given: dict[str, Any]) -> None:
    """Refuses options that would be ignored; ``reason`` says with or without what."""
    for name, value in given.items():
        if value is not None and value != []:
            raise TalosError(f"{name} means nothing {reason}; leave it out")


@contextmanager
def resumable(place: Path | None) -> Iterator[None]:
    """Says on Ctrl-C where the same command goes on from, and exits with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        hint = f"the same command goes on from {place}" if place else "--checkpoint-dir would keep finished rounds"
        if is_first():
            typer.echo(f"interrupted; {hint}", err=True)
        raise typer.Exit(130) from None


def load_vector(path: Path) -> TaskVector:
    """A task vector of a folder or of the Hub, which is not asked for what is beside a folder that is there."""
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        raise TalosError(f"{path}: no such folder; give what save_pretrained wrote, or a repository as user/name")
    return TaskVector.from_pretrained(path)


def load_weights(classifier: Classifier, path: Path | None) -> None:
    """Loads what merge wrote into the encoder, strictly.

    After the heads are made, which are the pre-trained model's: an edit is trained and judged with those.
    """
    if path is None:
        return
    try:
        classifier.encoder.load_state_dict(read_checkpoint(path), strict=True)
    except RuntimeError as error:
        raise TalosError(f"{path}: does not fit this model ({brief(error)})") from error
