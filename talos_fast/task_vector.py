"""`TaskVector`: the difference of two models: made from them, applied to one, saved and fetched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelHubMixin
from torch import Tensor

from talos_fast import vector_file
from talos_fast.applied import Applied
from talos_fast.delta import SparseDelta
from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.fingerprint import (
    Fingerprint,
    Target,
    complex_that_differ,
    fingerprint,
    loaded,
    named_tensors,
    require_base,
)
from talos_fast.interrupt import uninterrupted
from talos_fast.sparse_vector import SparseVector

CARD = """---
{{ card_data }}
---
# Task vector

Sparse task vector, made with talos-fast. Add it to the model it was made from:

```python
import talos_fast as talos

vector = talos.TaskVector.from_pretrained("path or repository")
model = talos.merge(base, [vector], alpha=1.0)  # and talos.merge(base, [-vector]) to forget the task
```
"""


class TaskVector(
    SparseVector,
    ModelHubMixin,
    library_name="talos-fast",
    tags=["task-vector", "task-arithmetic", "sparse"],
    model_card_template=CARD,
):
    """The difference between a fine-tuned and a pre-trained model, as a vector: add, subtract, scale, apply.

    Args:
        pretrained: the base: a module, a state dict, or a ``.safetensors`` checkpoint (file or folder).
        finetuned: the same model after training.
        info: provenance (JSON), kept in the file.

    Raises:
        TalosError: names, shapes or dtypes differ, entries are NaN or infinite, or a checkpoint cannot be read.

    Example:
        >>> base, tuned = {"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1.0, 0.0, -2.0])}
        >>> forget = -TaskVector(base, tuned)
        >>> forget.apply_to(base, scaling_coef=0.5)["w"].tolist()
        [0.0, -0.5, 0.0, 1.0]
    """

    def __init__(
        self,
        pretrained: Target | str | Path,
        finetuned: Target | str | Path,
        *,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        pretrained, finetuned = loaded(pretrained), loaded(finetuned)
        base, tuned = named_tensors(pretrained), named_tensors(finetuned)
        if unmatched := base.keys() ^ tuned.keys():
            name = min(unmatched)
            side = "pretrained" if name in base else "finetuned"
            raise TalosError(
                f"only the {side} model has {name!r} ({len(unmatched)} such names); give two states of one model"
            )
        deltas = {name: SparseDelta.between(name, base[name], tuned[name]) for name in base}
        if moved := complex_that_differ(pretrained, finetuned):
            raise TalosError(
                f"{moved[0]!r} is complex, and moved; a task vector is of real numbers, see torch.view_as_real"
            )
        self._set(deltas, fingerprint(pretrained), info)

    def _set(self, deltas: Mapping[str, SparseDelta], base: Fingerprint, info: Mapping[str, Any] | None) -> None:
        super()._set(deltas, base, info)
        self._applied = Applied()
        self._replace_from: dict[str, Tensor] | None = None  # while `save_pretrained` writes trained entries
        self._hub_mixin_config = None  # everything is in our own files; no config.json of constructor arguments

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles carry; they are applied to nothing."""
        return {key: value for key, value in vars(self).items() if key != "_applied"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set(state.pop("deltas"), state.pop("base"), state.pop("info"))
        vars(self).update(state)

    def apply_to(self, target: Target, scaling_coef: float = 1.0, *, check_base: bool = True) -> Target:
        """Adds ``scaling_coef`` times the vector, in place; `revert` takes it back bit for bit.

        One of a linearized model moves the parameters too; `talos_fast.merge` is what evaluates it as it was trained.

        Args:
            target: the base, as a module or state dict; only entries that moved are written.
            scaling_coef: 1 restores the fine-tuned model exactly, negative values forget the task.
            check_base: refuse a model that is not the base.

        Returns:
            ``target``.

        Raises:
            TalosError: another base, unknown names, other shapes, or already applied; nothing is written then.
        """
        if self._applied.get(target) is not None:
            raise TalosError("this task vector is applied to this model already; revert it first")
        if check_base:
            require_base(self.base, target, "the task vector")
        edit = Edit(target, self.deltas)
        with uninterrupted():
            edit.move(scaling_coef)
            self._applied.add(target, edit)
        return target

    def revert(self, target: Target) -> Target:
        """Restores the very bits that `apply_to` found in ``target``, and returns it.

        Raises:
            TalosError: this vector is not applied to ``target``, or what it moved was changed since, see
                `Edit.require_in_place`; nothing is written then.
        """
        with uninterrupted():
            edit = self._applied.get(target)
            if edit is None:
                raise TalosError("this task vector is not applied to this model; apply_to comes first")
            edit.require_in_place(target)
            edit.revert()
            self._applied.remove(target)
        return target

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        kind: Literal["delta", "replace"] = "delta",
        base: Target | str | Path | None = None,
        **hub_options: Any,
    ) -> str | None:
        """Writes ``task_vector.safetensors``, ``task_vector_config.json`` and a model card.

        Args:
            save_directory: made if it is not there.
            kind: "delta" writes fp32 differences; "replace" the trained entries themselves, in the dtype of the base
                (half the bytes for a bf16 model), from which a delta needs the base again at loading.
            base: the pre-trained model, for kind="replace".
            **hub_options: as `huggingface_hub.ModelHubMixin.save_pretrained` (``repo_id``, ``push_to_hub``, …).

        Raises:
            TalosError: the folder holds a model, or cannot be written (the old files are untouched); "replace" without
                the base, or of a vector that was scaled or summed and would be rounded.
        """
        vector_file.require_free(Path(save_directory))
        if kind not in ("delta", "replace"):
            raise TalosError(f"kind={kind!r}: choose 'delta' or 'replace'")
        if kind == "replace" and base is None:
            raise TalosError("kind='replace' stores trained entries: pass the pre-trained model as base=")
        if base is not None:
            tensors = named_tensors(base)
            require_base(self.base, tensors, "the task vector")
            self._replace_from = tensors if kind == "replace" else None
        try:
            return super().save_pretrained(save_directory, **hub_options)
        except OSError as error:
            raise TalosError(f"{save_directory}: cannot be written ({error})") from error
        finally:
            self._replace_from = None

    def _save_pretrained(self, save_directory: Path) -> None:
        vector_file.save(save_directory, self.deltas, self._replace_from, self.base, self.info)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        id_or_path: str | Path,
        *,
        base: Target | str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "TaskVector":
        """Reads a folder or a Hub repository that `save_pretrained` or `push_to_hub` wrote.

        Args:
            id_or_path: folder, or ``user/repository``.
            base: the pre-trained model; needed for files of kind "replace" only.
            revision, cache_dir, token, local_files_only: as in `huggingface_hub.hf_hub_download`.

        Raises:
            TalosError: no such folder or repository; truncated, corrupted or foreign file.
        """
        path = vector_file.locate(
            str(id_or_path), revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        deltas, identity, info = vector_file.load(path, None if base is None else named_tensors(base))
        return cls.from_deltas(deltas, base=identity, info=info)
