"""From a model's name to the model."""

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from talos_fast.errors import TalosError, needs
from talos_fast.models import encoders, open_clip, t5, timm
from talos_fast.models.base import Backbone
from talos_fast.modules import usable_device

PREFIXES = ("open_clip", "timm", "hf", "t5")


def load(
    name: str,
    *,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a pre-trained model.

    Args:
        name: `open_clip:ViT-B-32`, `timm:vit_tiny_patch16_224`, `hf:<directory or Hub id>` for a text encoder,
            `t5:<directory or Hub id>`, or `tiny`, the CLIP that comes with this package. Without a prefix: a
            directory with `config.json`, a name of open_clip, or a name of timm, in this order.
        pretrained: open_clip: a tag such as "openai", or a file; timm: a file, or "hub"; None for random weights. The
            others carry their weights.
        device: where the model goes.
        dtype: of its parameters.

    Example:
        >>> backbone = load("open_clip:ViT-B-32", pretrained="openai")
        >>> classifier = backbone.classifier(task)

    Raises:
        TalosError: a name that nothing knows, or weights that are missing, damaged or of another model.
    """
    kind, _, rest = name.partition(":")
    if kind not in PREFIXES and name != "tiny":
        kind, rest = _guess(name), name
    where = usable_device(device, "device")
    if kind == "open_clip":
        if ":" not in rest:  # open_clip's own hf-hub: and local-dir: are not in its list
            _check_name(kind, rest)
        return open_clip.load(rest, pretrained, where, dtype)
    if kind == "timm":
        _check_name(kind, rest.partition(".")[0])  # what follows a point is the tag of a set of weights
        return timm.load(rest, pretrained, where, dtype)
    if pretrained is not None:
        raise TalosError(f"pretrained: {name} carries its own weights, found {pretrained!r}; leave it out")
    if kind in ("t5", "hf") and rest.startswith(("/", ".", "~")) and not Path(rest).is_dir():
        raise TalosError(f"{name}: no such folder; give one with config.json, or a name on the Hub")
    if kind == "t5":
        return t5.load(rest, where, dtype)
    if kind == "hf":
        return encoders.load(rest, where, dtype)
    with needs("demo"):
        from talos_fast.demo.model import load_backbone

    return load_backbone(where, dtype)


def _guess(name: str) -> str:
    """The prefix for a name without one."""
    config = Path(name) / "config.json"
    if config.is_file():
        try:
            model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise TalosError(f"{config}: no model_type ({error!r}); give a Hugging Face model directory") from error
        return "t5" if model_type in t5.MODEL_TYPES else "hf"
    names = {package: _names(package) for package in ("open_clip", "timm")}
    for package, known in names.items():
        if name in known:
            return package
    tried = ", ".join(f"{len(known)} names of {package}" for package, known in names.items())
    raise TalosError(
        f"model {name!r}: tried a directory with config.json, {tried}, and none fits; "
        "write open_clip:, timm:, hf: or t5: before a name, or use tiny"
    )


def _check_name(package: str, name: str) -> None:
    """Refuse a name that `package` does not know, with those that are like it."""
    known = _names(package)
    if not known:
        raise TalosError(
            f"{package}:{name} needs the package {package}, which is not installed; pip install 'talos-fast[clip]'"
        )
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"see {package}.list_models()"
        raise TalosError(f"{package}:{name} is not a model of {package}; {hint}")


def _names(package: str) -> list[str]:
    """The models of open_clip or timm; empty where it is not installed."""
    try:
        module: Any = importlib.import_module(package)
    except ImportError:
        return []
    return [str(name) for name in module.list_models()]
