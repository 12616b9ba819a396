"""Count the bytes that a program moves, operator by operator, on tensors without data.

Tensors on "meta" or of FakeTensorMode need no memory and no time, so the sizes can be those of real
training.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from ..codegen.launches import Launch, RunLaunchers, record_launches

# Operators that allocate memory without writing it.
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Operators that overwrite their first argument without reading it.
OVERWRITING = ("copy_", "fill_", "zero_")


class Moved(TorchDispatchMode):
    """Count the bytes that ATen operators read and write, by name, in `nbytes`.

    Each input and output tensor counts once. Views and allocations count nothing. Expanded tensors
    count the elements that are stored.
    """

    def __init__(self):
        super().__init__()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "aten":
            with self:
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = function(*args, **kwargs)
        self.nbytes[function._opname] += _moved_by_operator(function, args, kwargs, output)
        return output


def _moved_by_operator(function, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    if function._opname in ALLOCATING:
        return 0
    inputs, parameters = _tensors((args, kwargs)), function._schema.arguments
    values = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
    written = _tensors([values.get(p.name) for p in parameters if p.is_write])
    overwritten = _tensors([values.get(p.name) for p in parameters if p.is_out])
    if function._opname in OVERWRITING:
        overwritten = written
    input_storages = {x.untyped_storage()._cdata for x in inputs}
    written += [x for x in _tensors(output) if x.untyped_storage()._cdata not in input_storages]
    if not written:
        return 0  # a view
    # A tensor that is passed twice is read once.
    read = {
        _region(x): stored_bytes(x) for x in inputs if not any(x is other for other in overwritten)
    }
    return sum(read.values()) + sum(map(stored_bytes, written))


def moved_by_launch(launch: Launch) -> int:
    """Return the bytes of a launch's tensors.

    Each argument counts once: a kernel here reads a tensor or writes it. Repeated reads are taken
    to come from a cache.
    """
    arguments = (
        value.base if isinstance(value, TensorDescriptor) else value
        for value in launch.arguments.values()
    )
    return sum(map(stored_bytes, _tensors(list(arguments))))


def moved(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Run `call` as on a GPU of sm_90, with kernels recorded instead of run.

    Returns: its result, and the bytes moved by name of the operator or kernel.
    """
    # RunLaunchers is entered last: Moved then sees the operators inside the launchers.
    with record_launches("sm_90") as launches, Moved() as seen, RunLaunchers():
        output = call()
    for launch in launches:
        seen.nbytes[launch.kernel.__name__] += moved_by_launch(launch)
    return output, +seen.nbytes


def stored_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor, where expanded axes count as one element."""
    sizes = (1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True))
    return math.prod(sizes) * x.element_size()


def _region(x: Tensor) -> tuple:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
