"""Task vectors on disk: one safetensors file that says everything, and a JSON beside it for people and tools."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from talos_fast import storage, writing
from talos_fast.delta import SparseDelta
from talos_fast.errors import TalosError
from talos_fast.fingerprint import Fingerprint, base_numel, require_base
from talos_fast.indexing import gather, index_dtype, scatter_

FILE = "task_vector.safetensors"
CONFIG = "task_vector_config.json"


def save(
    folder: Path,
    deltas: Mapping[str, SparseDelta],
    replace_from: Mapping[str, Tensor] | None,
    base: Fingerprint,
    info: Mapping[str, Any],
) -> None:
    """Writes the vector and its config; with ``replace_from`` (the base) the trained entries instead of deltas."""
    kind = "delta" if replace_from is None else "replace"
    tensors: dict[str, Tensor] = {}
    if replace_from is not None:
        _require_names(deltas, replace_from, folder)
    for name, delta in deltas.items():
        tensors |= storage.pack_selection(name, delta.indices, delta.numel)
        if replace_from is not None:
            tensors[f"{name}.values"] = _trained(name, delta, gather(replace_from[name].cpu(), delta.indices))
            continue
        tensors[f"{name}.values"] = delta.values
        if delta.rest is not None:
            where = delta.rest.nonzero()[:, 0]
            tensors[f"{name}.rest_positions"] = where.to(index_dtype(delta.numel))
            tensors[f"{name}.rest_values"] = delta.rest[where]
    shapes = {name: list(delta.shape) for name, delta in deltas.items()}
    content = {"shapes": shapes, "base": base, "info": info}
    storage.write(folder / FILE, kind, tensors, content)
    moved = sum(len(delta.values) for delta in deltas.values())
    summary = {
        "type": "task_vector",
        "format_version": storage.FORMAT_VERSION,
        "kind": kind,
        "entries_moved": moved,
        "density": moved / base_numel(base) if base else None,
        **content,
    }
    writing.write_json(folder / CONFIG, summary)


def require_free(folder: Path) -> None:
    """Refuses a folder that holds a model: huggingface_hub would delete its ``config.json``, merge replace its weights.

    Raises:
        TalosError: there is one.
    """
    if (folder / "config.json").exists():
        raise TalosError(f"{folder}: holds a model (config.json), which would lose files; give another folder")


def locate(id_or_path: str, **hub_options: Any) -> Path:
    """The vector's file in a folder, or fetched from the Hub repository ``user/name``.

    Args:
        id_or_path: folder or file, or ``user/name``.
        **hub_options: as in `huggingface_hub.hf_hub_download`.

    Raises:
        TalosError: neither such a folder nor a repository that can be reached.
    """
    if Path(id_or_path).is_dir():
        return Path(id_or_path) / FILE
    if Path(id_or_path).is_file():
        return Path(id_or_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", id_or_path):
        raise TalosError(f"{id_or_path}: no such folder; give what save_pretrained wrote, or a repository as user/name")
    try:
        fetched = hf_hub_download(id_or_path, FILE, dry_run=False, **hub_options)
    except (OSError, ValueError) as error:
        raise TalosError(f"{id_or_path}: neither a folder nor a repository that can be reached ({error})") from error
    return Path(fetched)


def load(
    path: Path, base_tensors: Mapping[str, Tensor] | None
) -> tuple[dict[str, SparseDelta], Fingerprint, dict[str, Any]]:
    """Deltas, base fingerprint and provenance of a file that `save` wrote.

    Raises:
        TalosError: missing, truncated, corrupted or foreign file; kind "replace" without the base, or with another.
    """
    kind, tensors, content = storage.read(path, ("delta", "replace"))
    if kind == "delta":
        base_tensors = None  # which has no part in it
    elif base_tensors is None:
        raise TalosError(f"{path}: holds trained entries (kind 'replace'); pass base= to get a delta")
    else:
        require_base(content["base"], base_tensors, str(path))
        _require_names(content["shapes"], base_tensors, path)
    deltas = {}
    for name, shape in content["shapes"].items():
        numel = torch.Size(shape).numel()
        indices = storage.unpack_selection(name, tensors, numel)
        values = tensors.get(f"{name}.values")
        if values is None or len(values) != (numel if indices is None else len(indices)):
            raise TalosError(f"{path}: values of {name!r} are missing or do not fit its selection; the file is damaged")
        if base_tensors is not None:
            deltas[name] = _replaced(name, base_tensors[name].cpu(), indices, values)
        else:
            deltas[name] = SparseDelta(tuple(shape), values, indices, _rest(name, tensors, values))
    return deltas, content["base"], content["info"]


def _require_names(names: Iterable[str], base: Mapping[str, Tensor], path: Path) -> None:
    for name in names:
        if name not in base:
            known = next(iter(base), None)
            raise TalosError(f"{path}: the vector moves {name!r}, which base= lacks; its names are like {known!r}")


def _trained(name: str, delta: SparseDelta, base: Tensor) -> Tensor:
    """The trained entries (k,), which must give the delta back."""
    entries = delta.applied(base)
    if not torch.equal((entries.double() - base.double()).to(delta.values.dtype), delta.values):
        raise TalosError(
            f"{name!r}: kind='replace' would round this vector to {base.dtype}; it is for trained vectors: "
            "use kind='delta'"
        )
    return entries


def _replaced(name: str, base: Tensor, indices: Tensor | None, values: Tensor) -> SparseDelta:
    tuned = base.clone()
    scatter_(tuned, indices, values)
    return SparseDelta.between(name, base, tuned)


def _rest(name: str, tensors: Mapping[str, Tensor], values: Tensor) -> Tensor | None:
    positions = tensors.get(f"{name}.rest_positions")
    if positions is None:
        return None
    rest = torch.zeros_like(values)
    rest[positions] = tensors[f"{name}.rest_values"]
    return rest
