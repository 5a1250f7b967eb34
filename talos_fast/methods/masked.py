"""Training the entries of a mask: what TaLoS and LoTA share."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.methods.base import Request, Setup, differences, snapshot
from talos_fast.optim import MaskedAdam
from talos_fast.optim.compaction import Entries


def masked(request: Request, mask: Mask, info: dict[str, Any] | None = None, entries: Entries = "selected") -> Setup:
    """Trains what the mask selects with MaskedAdam; every other entry stays bit-identical.

    Gradients of linear layers are computed for rows with selected entries only, and kept for selected entries only.
    Clipping uses the norm of those; the released code's, over whole tensors, also counts entries that never move.

    Args:
        request: what the user asked for.
        mask: which entries train.
        info: provenance.
        entries: whose norm is clipped.

    Raises:
        TalosError: a mask of another model, or one that selects nothing.
    """
    names = mask.freeze(request.model)
    if not names:
        raise TalosError(f"the mask selects none of its {mask.numel} entries; nothing would train")
    parameters = dict(request.model.named_parameters())
    trained = {name: parameters[name] for name in names}
    origin = snapshot(trained)
    optimizer = MaskedAdam(
        list(trained.items()), lr=request.lr, weight_decay=request.weight_decay,
        masks={name: mask[name] for name in names}, fused=True,
    )  # fmt: skip
    compaction = optimizer.compact_gradients()
    compaction.active = False

    @contextmanager
    def around() -> Iterator[None]:
        # Only within: the parameters are the user's, and others may differentiate by them too.
        compaction.active = True
        try:
            with optimizer.selected_rows():
                yield
        finally:
            compaction.active = False

    return Setup(
        trained, optimizer, request.forward, lambda: differences(origin, trained), mask=mask,
        clip=partial(optimizer.clip_grad_norm_, entries=entries), around=around, info=info or {},
    )  # fmt: skip
