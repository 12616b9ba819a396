"""Operators: `define_op` alone decides which implementation runs on which device.

It joins a Triton launcher and a PyTorch reference of the same signature into one operator:

    CUDA tensors     launch; without a launch the reference, with a warning
    CPU tensors      composite if there is one and it applies, else reference;
                     launch under TRITON_INTERPRET=1
    other devices    reference
    fake tensors     shapes if given, else reference   (torch.compile asks for shapes and dtypes)

Without Triton no operator has a launch. The operators are registered in a `torch.library.Library`,
and PyTorch's dispatcher chooses by the device of the tensors. An eager call of plain tensors goes
straight to the implementation that the dispatcher would choose: see _direct.py. `triton_op` fails
opcheck and fullgraph compilation on machines without a GPU.

Options that travel together are one frozen dataclass. `define_op` replaces such a parameter by its
fields in the schema, and every implementation receives the dataclass:

    reference(x: Tensor, options: Options) -> Tensor
    schema: (Tensor x, float scale, int window) -> Tensor
"""

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ._compile import opaque, with_short_messages
from ._direct import (
    WithoutGradient,
    device_of,
    eager_function,
    is_symbolic,
    is_transformed,
    needs_gradient,
    transformed_function,
)
from ._wrappers import on_device_of_tensors, with_one_warning, without_autocast, without_float64
from .triton import HAS_TRITON, triton

# Triton reads TRITON_INTERPRET when it decorates a kernel, at import.
INTERPRET = HAS_TRITON and triton.knobs.runtime.interpret

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Launchers by operator name, with the arguments of the schema. The bench runs them without a GPU.
LAUNCHERS: dict[str, Callable] = {}
_LIBRARY = torch.library.Library("tritium", "FRAGMENT")
# Python types that a public operator accepts for an annotation. torch.compile passes a SymInt or
# SymFloat for a number that varies.
ACCEPTED_TYPES = {
    Tensor: (Tensor,),
    int: (int, torch.SymInt),
    float: (float, int, torch.SymFloat, torch.SymInt),
    bool: (bool,),
    str: (str,),
    torch.dtype: (torch.dtype,),
    tuple[int, int]: (tuple, list),
    type(None): (type(None),),
}


def is_32_bit(x: Tensor, *_) -> bool:
    """Whether `x` has 32 bits or more: the default condition for a composite.

    For 16-bit tensors autograd would save the float32 copies in which references compute.
    """
    return x.dtype.itemsize > 2


def define_op(
    name: str,
    *,
    launch: Callable | None,
    reference: Callable,
    shapes: Callable | None = None,
    composite: Callable | None = None,
    composite_if: Callable[..., bool] = is_32_bit,
    mutates: Sequence[str] = (),
    public_name: str | None = None,
) -> "Op":
    """Register `tritium::name` and return it, ready to call.

    Args:
        name: operator name, unique in the `tritium` namespace.
        launch: runs the Triton kernels. None if the operator has no kernel yet.
        reference: the definition in PyTorch. Every parameter is annotated: the schema is read from
            the annotations. It must return new tensors.
        shapes: allocates the outputs of `reference` without computing them. Needed if `reference`
            loops over a size in Python: on fake tensors the loop would fix that size in compiled
            code.
        composite: computes the same result with PyTorch functions that autograd can differentiate.
            It runs on CPU tensors in place of the operator, without the cost of a custom operator.
            The first argument must be a tensor.
        composite_if: whether the composite applies to these arguments.
        mutates: names of the arguments written in place. `launch` must tell autograd about a write
            by a Triton kernel, with torch.autograd.graph.increment_version.
        public_name: name for messages. Default: `name` without the suffix "_fwd" or "_bwd".
    Returns: the operator. Give it a gradient with `register_autograd`.
    Raises: TypeError if another function does not have the signature of `reference`.
    """
    _check_signatures(name, reference, launch=launch, shapes=shapes, composite=composite)
    public_name = public_name or name.removesuffix("_fwd").removesuffix("_bwd")
    # The schema, and the reference for fake tensors.
    schema = _Schema(reference)
    implementations = {"cpu": without_autocast(reference)}
    run_reference = schema.flat(implementations["cpu"])
    signature = torch.library.infer_schema(run_reference, mutates_args=tuple(mutates))
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    run_fake = with_short_messages(run_reference if shapes is None else schema.flat(shapes))
    torch.library.register_fake(f"tritium::{name}", run_fake, lib=_LIBRARY)

    # The launcher for CUDA and for the interpreter, and the reference for all other devices.
    kernels = {"CompositeExplicitAutograd": run_reference}
    if launch is not None and HAS_TRITON:
        LAUNCHERS[name] = schema.flat(launch)
        run_launch = without_autocast(without_float64(public_name, launch))
        implementations["cuda"] = on_device_of_tensors(run_launch)
        kernels["CUDA"] = schema.flat(implementations["cuda"])
        if INTERPRET:
            implementations["cpu"] = run_launch
            kernels["CPU"] = schema.flat(run_launch)
    else:
        kernels["CUDA"] = with_one_warning(public_name, run_reference)
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, opaque(kernel), key)
    composite = composite and without_autocast(composite)
    # The dispatcher counts writes in place for autograd: such a call is never direct.
    direct = {} if mutates else implementations
    return Op(name, public_name, schema, composite, composite_if, direct)


def _check_signatures(name: str, reference: Callable, **roles: Callable | None) -> None:
    """Raise a TypeError unless the functions in `roles` have the signature of `reference`."""
    expected = inspect.signature(reference)
    for role, function in roles.items():
        if function and inspect.signature(function) != expected:
            raise TypeError(
                f"define_op: {name}: {role} must have the signature of reference, "
                f"{expected}, got {inspect.signature(function)}"
            )


class Op:
    """An operator made by `define_op`. Call it with the arguments of its reference."""

    def __init__(
        self,
        name: str,
        public_name: str,
        schema: "_Schema",
        composite: Callable | None,
        composite_if: Callable[..., bool],
        implementations: dict[str, Callable],
    ):
        self._name = name
        self._public_name = public_name
        self._overload = getattr(torch.ops.tritium, name).default
        self._has_gradient = False
        self._schema = schema
        self._composite = composite
        self._composite_if = composite_if
        self._implementations = implementations  # by type of device, for direct calls

    def __call__(self, *args):
        """Run the composite on a CPU if there is one and it applies, else the operator."""
        # A custom operator costs Python calls around its forward and backward: a fifth of a small
        # model's step (width 128, 768 tokens, two threads of an Intel Xeon, November 2026).
        return self._composite(*args) if self.uses_composite(*args) else self.dispatch(*args)

    def uses_composite(self, *args) -> bool:
        """Whether a call with these arguments runs the composite."""
        return self._composite is not None and runs_reference(args[0]) and self._composite_if(*args)

    def dispatch(self, *args):
        """Run the operator, never the composite."""
        device = device_of(args)
        implementation = self._implementations.get(device)
        if implementation is None:
            return self._dispatch(args)
        if not needs_gradient(args):
            return implementation(*args)
        if not self._has_gradient:
            return WithoutGradient.apply(self._name, implementation, *args)
        return self._eager_functions[device].apply(*args)

    def _dispatch(self, args: tuple):
        """Run the registered operator."""
        flat = self._schema.flatten(args)
        if forward_ad._current_level >= 0:  # inside torch.func.jvp or forward_ad.dual_level
            self._check_tangents(flat)
        if not self._has_gradient and torch.is_grad_enabled():
            return WithoutGradient.apply(self._name, self._overload, *flat)
        if self._has_gradient and not torch.compiler.is_compiling() and is_transformed():
            return self._transformed_function.apply(*flat)
        return self._overload(*flat)

    def _check_tangents(self, args: Sequence) -> None:
        """Raise if an argument has a tangent. PyTorch would return a tangent of zero."""
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        if any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
            raise NotImplementedError(
                f"{self._public_name}: forward-mode derivatives are not supported; "
                "use backward() or torch.func.vjp"
            )

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Register the gradient, as torch.library.register_autograd does.

        Args:
            backward: takes ctx and the gradients of the outputs; returns one gradient per argument
                of the reference, None for an options dataclass without gradients.
            setup_context: takes ctx, the arguments of the reference, and the outputs. Save
                tensors with ctx.save_for_backward, including tensors among the options.
        """

        def setup(ctx, inputs, output):
            setup_context(ctx, self._schema.group(inputs), output)

        def flat_backward(ctx, *grads):
            return self._schema.flatten(backward(ctx, *grads))

        self._has_gradient = True
        self._eager_functions = {
            device: eager_function(implementation, backward, setup_context)
            for device, implementation in self._implementations.items()
        }
        self._transformed_function = transformed_function(self._overload, flat_backward, setup)
        torch.library.register_autograd(
            f"tritium::{self._name}", flat_backward, setup_context=setup, lib=_LIBRARY
        )


class _Schema:
    """Translate between the arguments of a reference and those of its schema."""

    def __init__(self, reference: Callable):
        # For each parameter of the reference: (options class, names of its fields) or (None, ()).
        self._parameters = []
        flat = []
        for parameter in inspect.signature(reference).parameters.values():
            options = parameter.annotation
            if not dataclasses.is_dataclass(options):
                self._parameters.append((None, ()))
                flat.append(parameter)
                continue
            fields = dataclasses.fields(options)
            self._parameters.append((options, tuple(field.name for field in fields)))
            flat += [parameter.replace(name=field.name, annotation=field.type) for field in fields]
        self._signature = inspect.signature(reference).replace(parameters=flat)

    def flat(self, function: Callable) -> Callable:
        """Make an implementation take the arguments of the schema."""
        if all(options is None for options, _ in self._parameters):
            return function

        @functools.wraps(function)
        def run(*args):
            return function(*self.group(args))

        run.__signature__ = self._signature
        return run

    def group(self, args: Iterable) -> list:
        """Convert arguments of the schema to arguments of the reference."""
        args = iter(args)
        return [
            next(args) if options is None else options(**{name: next(args) for name in names})
            for options, names in self._parameters
        ]

    def flatten(self, args: Sequence) -> tuple:
        """Convert arguments of the reference to arguments of the schema.

        None in place of options becomes None for each field: gradients of options.
        """
        flat = []
        for arg, (options, names) in zip(args, self._parameters, strict=True):
            if options is None:
                flat.append(arg)
            else:
                flat += [None if arg is None else getattr(arg, name) for name in names]
        return tuple(flat)


def runs_reference(x: Tensor) -> bool:
    """Whether operators on `x` run their references: on a CPU, without Triton's interpreter."""
    return x.device.type == "cpu" and not INTERPRET


def is_eager(x: Tensor) -> bool:
    """Whether a call with `x` only computes values: no torch.compile, trace or fake tensor."""
    return not torch.compiler.is_compiling() and not is_symbolic(x)


def can_read_values(x: Tensor) -> bool:
    """Whether the values of `x` can be read, without synchronizing with a device.

    Inside torch.func.vmap a tensor stands for a batch. In a trace it stands for any values.
    """
    return x.device.type == "cpu" and not is_transformed() and not is_symbolic(x)


def keep_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Replace gradients that are not needed by None.

    An operator must return a tensor for each output. It returns empty tensors for gradients that
    are not needed.
    """
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def public(function: Callable) -> Callable:
    """Check the arguments of a public function or constructor against its annotations.

    Without this check Python would take True for a window of 1, and a wrong type would raise inside
    an implementation, with a message about another function. Floating-point tensors must have one
    of FLOATS, because PyTorch lacks many operations for other types, such as float8. An argument
    without an annotation is not checked.

    Raises: ValueError that names the argument. Missing, repeated and unknown arguments raise
        Python's own TypeError.
    """
    caller = function.__qualname__.removesuffix(".__init__")
    parameters = inspect.signature(function).parameters
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    positional = [name for name, p in parameters.items() if p.kind is not keyword_only]
    accepted_types = {
        name: _accepted_types(p.annotation)
        for name, p in parameters.items()
        if p.annotation is not p.empty
    }

    def check_argument(name: str, value: object) -> None:
        accepted = accepted_types[name]
        # bool is a subclass of int.
        is_stray_bool = type(value) is bool and bool not in accepted
        if not isinstance(value, accepted) or is_stray_bool:
            expected = inspect.formatannotation(parameters[name].annotation)
            raise ValueError(
                f"{caller}: {name} must be {expected.replace('torch.', '')}, "
                f"got {_describe(value)}; convert it"
            )
        if not isinstance(value, Tensor):
            return
        if is_dtensor(value):
            raise ValueError(
                f"{caller}: {name} must be a tensor of this process, got a DTensor; "
                "pass its to_local() or full_tensor()"
            )
        if value.is_floating_point() and value.dtype not in FLOATS:
            expected = ", ".join(map(str, FLOATS)).replace("torch.", "")
            raise ValueError(
                f"{caller}: {name} must be one of {expected}, got {value.dtype}; cast it"
            )

    @functools.wraps(function)
    def checked(*args, **options):
        for name, value in (*zip(positional, args, strict=False), *options.items()):
            if name not in accepted_types:
                continue  # It has no annotation, or it is unknown and the call below raises.
            # Most values have the first type of their annotation. This check is faster.
            first, type_ = accepted_types[name][0], type(value)
            if type_ is Tensor or type_ is Parameter:
                is_usual = first is Tensor and value.dtype in FLOATS
            else:
                is_usual = type_ is first
            if not is_usual:
                check_argument(name, value)
        return function(*args, **options)

    return checked


def is_dtensor(value: Tensor) -> bool:
    """Whether a tensor is distributed. Does not import torch.distributed.tensor to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _accepted_types(annotation: object) -> tuple[type, ...]:
    """Types that an annotation such as `int | None` accepts."""
    is_union = isinstance(annotation, types.UnionType)
    alternatives = annotation.__args__ if is_union else (annotation,)
    return tuple(type_ for name in alternatives for type_ in ACCEPTED_TYPES[name])


def _describe(value: object) -> str:
    """Describe a value for an error message. Never reads a tensor, which may be on a device."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (int, float, str, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
