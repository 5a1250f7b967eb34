"""Which base model a mask or a task vector belongs to, and which data a run: digests of bits."""

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from talos_fast.batch import Batch, tensors_of
from talos_fast.errors import TalosError
from talos_fast.modules import unwrapped

Fingerprint = dict[str, str]
"""Parameter name -> "dtype shape digest", such as "float32 768x768 9f86d081884c7d65"."""

Target = nn.Module | Mapping[str, Tensor]
"""What can be fingerprinted and edited: a module, or a state dict."""


def named_tensors(target: Target | str | Path) -> dict[str, Tensor]:
    """The floating-point tensors of a module, a state dict or a ``.safetensors`` checkpoint, by name.

    A module gives its parameters and its floating-point buffers that would be saved; tied parameters come once, and
    wrappers are looked through, see `unwrapped`.
    The tensors share memory with the target, so editing them edits it.

    Raises:
        TalosError: the checkpoint is missing or cannot be read.
    """
    target = loaded(target)
    if isinstance(target, nn.Module):
        target = unwrapped(target)
        tensors = {name: p.data for name, p in target.named_parameters()}
        saved = target.state_dict(keep_vars=True)
        tensors.update({name: b.data for name, b in target.named_buffers() if name in saved})
    else:
        tensors = {name: t.data for name, t in target.items() if isinstance(t, Tensor)}
    return {name: t for name, t in tensors.items() if t.is_floating_point()}


def loaded(target: Target | str | Path) -> Target:
    """The tensors of a checkpoint by name; a module or state dict as it is."""
    return read_checkpoint(Path(target)) if isinstance(target, str | Path) else target


def complex_that_differ(first: Target, second: Target) -> list[str]:
    """Names of complex tensors that are not the same in both."""
    one, other = (unwrapped(t).state_dict() if isinstance(t, nn.Module) else t for t in (first, second))
    found = {name: t for name, t in one.items() if isinstance(t, Tensor) and t.is_complex() and not t.is_meta}
    return [name for name, t in found.items() if name in other and identify(t) != identify(other[name])]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Everything in a ``.safetensors`` file, or in a folder's ``model.safetensors``.

    Raises:
        TalosError: it is missing or cannot be read.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise TalosError(
            f"{path}: no such checkpoint; give a .safetensors file or a folder that holds model.safetensors"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise TalosError(f"{path}: not a readable safetensors checkpoint ({error}); save it again") from error


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def identify(tensor: Tensor) -> str:
    """dtype, shape and a 64-bit digest of the bits of a tensor; independent of device, strides and the sign of zeros.

    A difference does not tell -0.0 from 0.0, so a vector cannot restore which of the two a trained entry was.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_floating_point() and flat.element_size() in _INTEGERS:
        integers = flat.view(_INTEGERS[flat.element_size()])
        negative = integers == torch.iinfo(integers.dtype).min  # the bits of -0.0
        flat = torch.where(negative, 0, integers) if bool(negative.any()) else flat
    bits = hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=8).hexdigest()
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {bits}"


def digest(recorded: Fingerprint) -> str:
    """One digest, as hex, of a whole fingerprint."""
    return hashlib.blake2b(repr(sorted(recorded.items())).encode(), digest_size=8).hexdigest()


def batch_digest(batch: Batch) -> str:
    """One digest, as hex, of all tensors of a batch."""
    dense = (tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in tensors_of(batch))
    return digest({str(number): identify(tensor) for number, tensor in enumerate(dense)})


def base_numel(recorded: Fingerprint) -> int:
    """How many entries the fingerprinted tensors have together."""
    shapes = (entry.split()[1] for entry in recorded.values())
    return sum(1 if shape == "scalar" else prod(map(int, shape.split("x"))) for shape in shapes)


def fingerprint(target: Target) -> Fingerprint:
    """Digests of a module's parameters, or of every floating-point tensor of a state dict.

    Buffers of a module are left out: heads and running statistics may differ between tasks of one base.
    """
    if isinstance(target, nn.Module):
        return {name: identify(p) for name, p in unwrapped(target).named_parameters() if p.is_floating_point()}
    return {name: identify(t) for name, t in named_tensors(target).items()}


def require_base(recorded: Fingerprint, target: Target, what: str) -> None:
    """Refuses a target whose tensors are not those that ``recorded`` was taken from.

    Tensors that only one side has are not compared: a vision tower alone may be edited with a vector of the whole
    model.

    Raises:
        TalosError: names the first tensor that differs, and says how many do.
    """
    tensors = named_tensors(target)
    found = {name: identify(tensors[name]) for name in recorded if name in tensors}
    differing = [name for name, entry in found.items() if entry != recorded[name]]
    if differing:
        name = differing[0]
        raise TalosError(
            f"{what} belongs to another base: {len(differing)} of {len(found)} tensors differ, the first is {name!r} "
            f"(recorded {recorded[name]}, found {found[name]}); load the checkpoint it was made from, in the same "
            "dtype, or keep a copy of the model before finetune, which trains in place, and revert what is applied"
        )


def join(first: Fingerprint, second: Fingerprint, what: str) -> Fingerprint:
    """The union of two fingerprints of one base.

    Raises:
        TalosError: they disagree on a tensor, which is named.
    """
    for name, value in second.items():
        if first.get(name, value) != value:
            raise TalosError(
                f"{what}: made from different bases, which differ in {name!r}; combine vectors of one base "
                "(finetune trains in place: start each task from a copy of the pre-trained model)"
            )
    return first | second
