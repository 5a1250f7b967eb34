"""`Applied`: which models a task vector is applied to."""

from weakref import WeakKeyDictionary

from torch import nn

from talos_fast.edit import Edit
from talos_fast.fingerprint import Target
from talos_fast.modules import unwrapped


class Applied:
    """The edit of each target, whatever wraps it.

    A module may go meanwhile. A state dict cannot be referred to weakly; it is held, so that its id stays its own.
    """

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[nn.Module, Edit] = WeakKeyDictionary()
        self._state_dicts: dict[int, tuple[Target, Edit]] = {}

    def get(self, target: Target) -> Edit | None:
        """None: it is not applied to that."""
        if isinstance(target, nn.Module):
            return self._modules.get(unwrapped(target))
        _, edit = self._state_dicts.get(id(target), (None, None))
        return edit

    def add(self, target: Target, edit: Edit) -> None:
        """It is applied to that from now on."""
        if isinstance(target, nn.Module):
            self._modules[unwrapped(target)] = edit
        else:
            self._state_dicts[id(target)] = target, edit

    def remove(self, target: Target) -> None:
        """It is no longer."""
        if isinstance(target, nn.Module):
            del self._modules[unwrapped(target)]
        else:
            del self._state_dicts[id(target)]
