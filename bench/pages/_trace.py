"""Run a kernel's control flow in Python, to draw the tiles that it walks.

A kernel is a Python function of the module `tl`. `trace` runs it with a stand-in for `tl`: numbers
that decide which tiles are visited are Python numbers, and tensors are `Ignored`. Helpers of the
kernel that the caller names are recorded instead of run. So a picture shows what the code does.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from ...kernels.core.triton import cdiv

_OPERATIONS = ("add", "sub", "mul", "floordiv", "mod")


class Ignored:
    """A tensor whose values do not matter: each operation with it gives another one."""

    def _ignore(self, *_, **__) -> "Ignored":
        return self

    def __getattr__(self, name: str) -> "Ignored":
        return self

    __call__ = __getitem__ = __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = _ignore
    __truediv__ = __rtruediv__ = __neg__ = _ignore


class Number(int):
    """A number of a kernel. Its results are Numbers too, and a conversion keeps it."""

    def to(self, _) -> "Number":
        return self


def _number_operation(name: str) -> Callable:
    def operation(self, other):
        result = getattr(int, name)(self, other)
        return result if result is NotImplemented else Number(result)

    return operation


for _operation in _OPERATIONS:
    for _name in (f"__{_operation}__", f"__r{_operation}__"):
        setattr(Ignored, _name, Ignored._ignore)
        setattr(Number, _name, _number_operation(_name))
IGNORED = Ignored()


def _stand_in(program: tuple[int, ...], programs: tuple[int, ...], values: Mapping) -> Any:
    """Return a stand-in for `tl` in one program."""

    class Descriptor:
        """The type of a descriptor. No argument has it: sources are pointers."""

    known = {
        "program_id": lambda axis: Number(program[axis]),
        "num_programs": lambda axis: Number(programs[axis]),
        "minimum": lambda a, b: _both(min, a, b),
        "maximum": lambda a, b: _both(max, a, b),
        "cdiv": cdiv,
        "cast": lambda value, _: value,
        "range": lambda *bounds, **_: range(*bounds),
        "static_range": range,
        "tensor_descriptor": Descriptor,
        "load": lambda pointer, **_: Number(values[pointer]) if pointer in values else IGNORED,
    }

    class StandIn:
        def __getattr__(self, name: str) -> Any:
            return known.get(name, IGNORED)

    return StandIn()


def _both(choose: Callable, a: Any, b: Any) -> Any:
    is_known = isinstance(a, int) and isinstance(b, int)
    return Number(choose(a, b)) if is_known else IGNORED


def trace(
    kernel: Any,
    recorded: Mapping[str, int],
    *,
    program: tuple[int, ...],
    programs: tuple[int, ...],
    values: Mapping[Any, int] = types.MappingProxyType({}),
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Run one program of a kernel. Return the arguments of each recorded call, in their order.

    Args:
        kernel: the result of @triton.jit.
        recorded: helper name -> number of values it returns; the helper returns its first
            arguments. With the name "range", the numbers of Python's loops are recorded too.
        program, programs: this program's place in the grid, and the grid.
        values: numbers in memory, by pointer. All other loads are ignored.
        arguments: of the kernel. Other arguments are Ignored.
    """
    calls: list[dict[str, Any]] = []
    tl = _stand_in(program, programs, values)

    def record(function: Callable, count: int) -> Callable:
        def call(*args):
            names = inspect.signature(function).parameters
            calls.append({"helper": function.__name__, **dict(zip(names, args, strict=True))})
            return args[0] if count == 1 else args[:count]

        return call

    def record_range(*bounds: int) -> range:
        calls.append({"helper": "range", "numbers": range(*bounds)})
        return range(*bounds)

    def plain(function: Any) -> Callable:
        """Return the Python function, with helpers that are Python functions too."""
        source = getattr(function, "fn", function)
        names = source.__globals__
        inner = {"range": record_range} if "range" in recorded else {}
        for name in source.__code__.co_names:
            helper = names.get(name)
            if name in recorded and name != "range":
                inner[name] = record(getattr(helper, "fn", helper), recorded[name])
            elif hasattr(helper, "fn"):
                inner[name] = plain(helper)
        return types.FunctionType(source.__code__, {**names, **inner, "tl": tl})

    parameters = inspect.signature(getattr(kernel, "fn", kernel)).parameters
    given = {name: arguments.get(name, IGNORED) for name in parameters}
    plain(kernel)(
        **{name: Number(value) if type(value) is int else value for name, value in given.items()}
    )
    return calls
