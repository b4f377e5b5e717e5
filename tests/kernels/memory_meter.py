"""Memory that torch allocates, counted exactly and on any machine."""

import weakref

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered; ``peak`` is the most held at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._held = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            self._address(each) for each in tree_leaves((args, kwargs)) if hasattr(each, "untyped_storage")
        }
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if hasattr(each, "untyped_storage") and self._address(each) not in given | self._known:
                self._count(each.untyped_storage())
        return result

    @staticmethod
    def _address(tensor):
        return tensor.untyped_storage()._cdata

    def _count(self, storage):
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address, size):
        self._known.discard(address)
        self._held -= size
