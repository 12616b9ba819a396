"""What a program does to memory, operator by operator, on tensors that hold nothing: bytes moved, bytes held.

Tensors on "meta", or those of FakeTensorMode where an operator asks for their device, cost neither memory nor time, so sizes
are those of real training. Modes go on top of one another: Launchers last, so that the others see inside it.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.core.op import LAUNCHERS
from ..codegen.launches import Launch, record_launches

# What takes memory and leaves in it what was there, and what overwrites its first argument without reading it.
ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITING = ("copy_", "fill_", "zero_")


class Launchers(TorchDispatchMode):
    """Has tritium's operators do on any device what they do on CUDA: run their launchers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritium":
            function = LAUNCHERS[function._opname]
        return function(*args, **(kwargs or {}))


class Held(TorchDispatchMode):
    """Bytes of the tensors made inside: `now` there, the `most` there at once, `allocated` in all.

    Args:
        tensors: those that were there before, and do not count.
    """

    now = most = allocated = 0

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
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


class Moved(TorchDispatchMode):
    """Adds up in `nbytes`, by name, what ATen operators read and write: each tensor that they take or give counts once.

    Views and allocations move nothing. Of an expanded tensor counts what is stored.
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
        self.nbytes[function._opname] += _moved(function, args, kwargs, output)
        return output


def _moved(function, args: tuple, kwargs: dict[str, Any], output: Any) -> int:
    if function._opname in ALLOCATING:
        return 0
    taken, arguments = _tensors((args, kwargs)), function._schema.arguments
    values = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written = _tensors([values.get(argument.name) for argument in arguments if argument.is_write])
    overwritten = _tensors([values.get(argument.name) for argument in arguments if argument.is_out])
    if function._opname in OVERWRITING:
        overwritten = written
    there = {x.untyped_storage()._cdata for x in taken}
    written += [x for x in _tensors(output) if x.untyped_storage()._cdata not in there]
    if not written:
        return 0  # a view
    read = {
        _region(x): stored_bytes(x) for x in taken if not any(x is other for other in overwritten)
    }
    return sum(read.values()) + sum(map(stored_bytes, written))


def moved_by_launch(launch: Launch) -> int:
    """Bytes of the tensors that a launch is given, each argument once: a kernel here reads a tensor or writes it.

    What programs read again, or out of one another's rows, is taken to come out of a cache.
    """
    arguments = (
        value.base if isinstance(value, TensorDescriptor) else value
        for value in launch.arguments.values()
    )
    return sum(map(stored_bytes, _tensors(list(arguments))))


def moved(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Run `call` as on a GPU of sm_90, but for the kernels. Returns: what it returns, and bytes moved by operator or kernel."""
    with record_launches("sm_90") as launches, Moved() as seen, Launchers():
        output = call()
    for launch in launches:
        seen.nbytes[launch.kernel.__name__] += moved_by_launch(launch)
    return output, +seen.nbytes


def held(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> dict[str, int]:
    """Run `forward` and its backward as on a GPU, but for the kernels; the output goes as soon as the backward begins.

    Returns: bytes `kept` in between, beside `inputs` and the output, the `most` there at once, and `allocated` in all.
    """
    with mock.patch.object(JITFunction, "run", _not_launched), Held(*inputs) as seen, Launchers():
        y = forward()
        kept, dy, edge = seen.now - y.nbytes, torch.empty_like(y), get_gradient_edge(y)
        del y
        torch.autograd.grad(edge, inputs, dy)
    return {"kept": kept, "most": seen.most, "allocated": seen.allocated}


def _not_launched(*args, **kwargs) -> None:
    """Unlike a note of record_launches this keeps nothing that the launch was given."""


def stored_bytes(x: Tensor) -> int:
    """Bytes of the elements that differ in address."""
    return (
        math.prod(
            1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)
        )
        * x.element_size()
    )


def _region(x: Tensor) -> tuple:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
