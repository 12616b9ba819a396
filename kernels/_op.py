"""Which device runs what, decided once: every operator of tritium is registered here.

`define_op` joins a Triton launcher and a PyTorch reference of the same signature into one `torch.library` operator:

    CUDA tensors                          -> launch
    CPU tensors                           -> reference, or launch under TRITON_INTERPRET=1 (Triton's interpreter)
    any other device, or Triton missing   -> reference
    shapes and dtypes (torch.compile)     -> shapes where one is given, else reference, run on fake tensors

PyTorch's dispatcher chooses by the tensors' device. Nothing falls back silently on CUDA: an operator without a kernel says so
once. `custom_op` rather than `triton_op`: the latter fails opcheck and fullgraph compilation where there is no GPU.

`public` is what stands over the function that users call: it checks the kinds of its arguments.
"""

import functools
import inspect
import typing
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._triton import HAS_TRITON, triton

# As Triton itself reads TRITON_INTERPRET when it decorates a kernel, at import.
INTERPRET = HAS_TRITON and triton.knobs.runtime.interpret

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Launchers by the name of their operator: the bench runs them where no GPU is.
LAUNCHERS: dict[str, Callable] = {}
# What passes for an annotation: an int for a float too, and what torch.compile has in place of numbers that vary.
KINDS = {
    Tensor: (Tensor,),
    int: (int, torch.SymInt),
    float: (float, int, torch.SymFloat, torch.SymInt),
    bool: (bool,),
    str: (str,),
    type(None): (type(None),),
}


def define_op(
    name: str, *, launch: Callable | None, reference: Callable, shapes: Callable | None = None, mutates: Sequence[str] = ()
):  # fmt: skip
    """Register `tritium::name` and return it, ready to call and for `.register_autograd`.

    Args:
        name: operator name, unique in the `tritium` namespace.
        launch: runs the Triton kernels; same signature as `reference`. None while an operator has no kernel yet.
        reference: the definition in PyTorch; fully annotated (the operator's schema is read off it), returns new tensors.
        shapes: allocates what `reference` returns, in shape, dtype and strides, and computes nothing; same signature. Needed
            where `reference` loops over a size in Python: run on fake tensors, that binds compiled code to the size.
        mutates: names of the arguments written in place.
    Returns: torch.library.CustomOpDef.
    Raises: TypeError if the signatures of `launch` or `shapes` and `reference` differ.
    """
    for role, function in (("launch", launch), ("shapes", shapes)):
        if function is not None and inspect.signature(function) != inspect.signature(reference):
            raise TypeError(
                f"define_op: {name}: {role} must have the signature of reference, {inspect.signature(reference)}, "
                f"got {inspect.signature(function)}; make them equal"
            )
    reference = _without_autocast(reference)
    op = torch.library.custom_op(f"tritium::{name}", reference, mutates_args=tuple(mutates))
    op.register_fake(reference if shapes is None else shapes)
    if launch is not None and HAS_TRITON:
        LAUNCHERS[name] = launch
        launch = _without_autocast(_without_float64(name.removesuffix("_fwd").removesuffix("_bwd"), launch))
        op.register_kernel("cuda")(_on_its_device(launch))
        if INTERPRET:
            op.register_kernel("cpu")(launch)
    else:
        op.register_kernel("cuda")(_saying_so_once(name, reference))
    return op


def runs_reference(x: Tensor) -> bool:
    """Whether operators on `x` run PyTorch's functions by design: on a CPU, except in Triton's interpreter."""
    return x.device.type == "cpu" and not INTERPRET


def differentiable(op: torch.library.CustomOpDef, *args):
    """op(*args), or its reference where that is what runs, for autograd to differentiate step by step.

    The calls in Python around custom operators, forward and backward, were a fifth of a small model's step (width 128, 768
    tokens, two threads of an Intel Xeon, November 2026). Not in 16 bits, of which autograd would keep what references widen.
    """
    plain = runs_reference(args[0]) and args[0].dtype.itemsize > 2
    return op._init_fn(*args) if plain else op(*args)


def public(function: Callable) -> Callable:
    """Have a public operator refuse arguments that are not what its annotations say, by name, with a ValueError.

    Python would take True for a window of 1 and hand other types on to where the caller's name of them is not known. Floating
    tensors are to be of FLOATS: a float8 has none of the operations that follow.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    kinds = {
        name: sum((KINDS[kind] for kind in typing.get_args(annotation) or (annotation,)), ())
        for name, annotation in annotations.items()
    }

    @functools.wraps(function)
    def checked(*args, **options):
        for name, value in (*zip(positional, args, strict=False), *options.items()):
            if name not in kinds:
                continue  # the call itself raises
            expected = kinds[name]
            if not isinstance(value, expected) or (type(value) is bool and bool not in expected):
                kind = inspect.formatannotation(annotations[name]).replace("torch.", "")
                raise ValueError(f"{function.__name__}: {name} must be {kind}, got {_described(value)}; convert it")
            if isinstance(value, Tensor) and value.dtype not in FLOATS and value.is_floating_point():
                accepted = ", ".join(map(str, FLOATS)).replace("torch.", "")
                raise ValueError(f"{function.__name__}: {name} must be one of {accepted}, got {value.dtype}; cast it")
        return function(*args, **options)

    return checked


def _described(value: object) -> str:
    """What an error shall call it: never what is in a tensor, which may be on a device, or in something that holds one."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value) if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a matrix product receives under torch.autocast: float32 and half inputs in the autocast dtype; else unchanged."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def can_look(x: Tensor) -> bool:
    """Whether what `x` holds can be read without waiting for a device."""
    return x.device.type == "cpu"


def only_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None in place of gradients that nobody needs, which operators return empty."""
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write a @ b to `out`, or add it there. Into a float32 `out` factors of 16 bits are summed without rounding in between."""
    beta = int(accumulate)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.device.type in ("cuda", "meta") and not torch.version.hip:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        # Only cuBLAS multiplies 16 bits into 32.
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _without_autocast(function: Callable) -> Callable:
    """References and launches choose their own precision; an active autocast must not lower the products inside them."""

    @functools.wraps(function)
    def run(*args):
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*args)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def _without_float64(name: str, launch: Callable) -> Callable:
    """Kernels accumulate in float32, so float64 would be answered with float32's accuracy: refuse it."""

    @functools.wraps(launch)
    def run(*args):
        if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            raise TypeError(f"{name}: the kernel takes float32, bfloat16 or float16, got float64; move the tensors to the CPU")
        return launch(*args)

    return run


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current GPU; the tensors may be on another."""

    @functools.wraps(launch)
    def run(*args):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def _saying_so_once(name: str, reference: Callable) -> Callable:
    @functools.cache
    def say():
        why = "has no Triton kernel yet" if HAS_TRITON else "needs Triton, which is not installed"
        warnings.warn(f"tritium: {name} {why}; CUDA runs its PyTorch reference", stacklevel=4)

    @functools.wraps(reference)
    def run(*args):
        say()
        return reference(*args)

    return run
