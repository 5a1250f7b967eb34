"""The file format of masks and task vectors: safetensors, packed selections, a checksum.

For a parameter ``w`` of n entries, k of them selected, a file holds

    nothing beside ``w.values``       when all n are selected
    ``w.indices``  int32, ascending   when that is smaller (int64 from 2**31 entries on)
    ``w.bitmask``  uint8, n bits      otherwise; bit i of byte j is entry 8 j + i

flat in C order, and for vectors ``w.values`` (k,). Everything else (shapes, base, provenance) is JSON in the metadata.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from talos_fast.errors import TalosError
from talos_fast.indexing import index_dtype
from talos_fast.writing import atomic, json_for

FORMAT_VERSION = 1


def selection_nbytes(selected: int, numel: int) -> int:
    """Bytes that a file spends on saying which of ``numel`` entries are selected."""
    if selected == numel:
        return 0
    return min(selected * index_dtype(numel).itemsize, math.ceil(numel / 8))


def pack_selection(name: str, indices: Tensor | None, numel: int) -> dict[str, Tensor]:
    """The tensors that record a selection; ``indices`` are flat and ascending, None selects everything."""
    if indices is None or len(indices) == numel:
        return {}
    if len(indices) * index_dtype(numel).itemsize <= math.ceil(numel / 8):
        return {f"{name}.indices": indices.to("cpu", index_dtype(numel))}
    flags = np.zeros(numel, dtype=bool)
    flags[indices.cpu().numpy()] = True
    return {f"{name}.bitmask": torch.from_numpy(np.packbits(flags, bitorder="little"))}


def unpack_selection(name: str, tensors: Mapping[str, Tensor], numel: int) -> Tensor | None:
    """The inverse of `pack_selection`: flat ascending indices, or None where everything is selected.

    Raises:
        TalosError: what is recorded does not fit a tensor of ``numel`` entries.
    """
    bitmask = tensors.get(f"{name}.bitmask")
    if bitmask is not None:
        if bitmask.numel() != math.ceil(numel / 8):
            raise TalosError(f"{name!r}: a bitmask of {bitmask.numel()} bytes for {numel} entries; the file is damaged")
        flags = np.unpackbits(bitmask.numpy(), count=numel, bitorder="little")
        return torch.from_numpy(np.flatnonzero(flags)).to(index_dtype(numel))
    indices = tensors.get(f"{name}.indices")
    if indices is not None and indices.numel():
        inside = int(indices[0]) >= 0 and int(indices[-1]) < numel
        if not inside or not bool((indices[1:] > indices[:-1]).all()):
            raise TalosError(f"{name!r}: indices are not ascending within {numel} entries; the file is damaged")
    return indices


def require_same_run(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuses a file of another run; the key "data" stands for a digest of a batch.

    Raises:
        TalosError: says what differs.
    """
    for key, value in mine.items():
        if theirs.get(key) != value:
            what = f"{key}={theirs.get(key)!r}, this one has {key}={value!r}"
            if key == "data":
                what = "other batches: other data, another batch size, or another order"
            raise TalosError(
                f"{path}: of a run with {what}; use another checkpoint_dir, or start over with resume=False "
                "(--no-resume)"
            )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Writes one file of this format.

    Args:
        path: where; its folder is made.
        kind: of what: "mask", "delta", "replace" or "checkpoint".
        tensors: on the CPU.
        content: what `read` gives back, JSON.
    """
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    metadata = {
        "format": "pt",
        "talos_format": str(FORMAT_VERSION),
        "kind": kind,
        "checksum": _checksum(contiguous),
        "content": json_for(path, content),
    }
    with atomic(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def read(path: Path, kinds: tuple[str, ...]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Reads a file that `write` made: its kind, tensors and content.

    Raises:
        TalosError: missing, truncated, corrupted, foreign, of a newer format, or of another kind.
    """
    if path.is_dir():
        raise TalosError(f"{path}: a folder, where the file of a {' or '.join(kinds)} is expected")
    if not path.is_file():
        raise TalosError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise TalosError(f"{path}: truncated or not a safetensors file ({error}); make or fetch it again") from error
    version = metadata.get("talos_format")
    if version is None:
        raise TalosError(f"{path}: a safetensors file, but not one of talos-fast; expected a {' or '.join(kinds)}")
    if version != str(FORMAT_VERSION):
        raise TalosError(f"{path}: format {version}, this version reads format {FORMAT_VERSION}; upgrade talos-fast")
    if metadata.get("kind") not in kinds:
        raise TalosError(f"{path}: holds a {metadata.get('kind')}, expected a {' or '.join(kinds)}")
    if metadata.get("checksum") != _checksum(tensors):
        raise TalosError(f"{path}: corrupted (its checksum does not match its content); make or fetch it again")
    return metadata["kind"], tensors, json.loads(metadata["content"])
