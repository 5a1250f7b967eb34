"""`Applied`: which models a task vector is applied to."""

from weakref import WeakKeyDictionary

from torch import nn

from talos_fast.edit import Edit
from talos_fast.fingerprint import Target
from talos_fast.modules import unwrapped


class Applied:
    """The edit applied to each target; a module is the same one inside whatever wrapper.

    Modules are referenced weakly. State dicts cannot be, so they are kept alive: no other may get the id of one.
    """

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[nn.Module, Edit] = WeakKeyDictionary()
        self._state_dicts: dict[int, tuple[Target, Edit]] = {}

    def get(self, target: Target) -> Edit | None:
        """The edit that is applied to ``target``; None if none is."""
        if isinstance(target, nn.Module):
            return self._modules.get(unwrapped(target))
        _, edit = self._state_dicts.get(id(target), (None, None))
        return edit

    def add(self, target: Target, edit: Edit) -> None:
        """Records that ``edit`` is applied to ``target``."""
        if isinstance(target, nn.Module):
            self._modules[unwrapped(target)] = edit
        else:
            self._state_dicts[id(target)] = target, edit

    def remove(self, target: Target) -> None:
        """Forgets the edit of ``target``."""
        if isinstance(target, nn.Module):
            del self._modules[unwrapped(target)]
        else:
            del self._state_dicts[id(target)]
