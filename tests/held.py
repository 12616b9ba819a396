"""Count the bytes of tensors, also of tensors on "meta", which take no memory."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Count the bytes of the tensors made inside.

    Args:
        tensors: tensors made before, which do not count.

    Attributes:
        now: bytes that exist now.
        most: largest value of `now`.
        allocated: bytes of all tensors made.
    """

    now = most = allocated = 0

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage):
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += nbytes
            self.most = max(self.most, self.now)
            self.allocated += nbytes
            weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key, nbytes):
        self.seen.discard(key)
        self.now -= nbytes
