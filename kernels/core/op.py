"""Operators: `define_op` alone decides which implementation runs on which device.

It joins a Triton launcher and a PyTorch reference of the same signature into one operator:

    CUDA tensors     launch; without a launch the reference, with a warning
    CPU tensors      composite if there is one and it applies, else reference;
                     launch under TRITON_INTERPRET=1
    other devices    reference
    fake tensors     shapes if given, else reference   (torch.compile asks for shapes and dtypes)

Without Triton no operator has a launch. PyTorch's dispatcher chooses by the device of the tensors;
only the composite is chosen in Python. The operators are registered in a `torch.library.Library`:
a call of an operator with a gradient takes 16 us, of one without 8 us. With `custom_op`, which does
the same with more Python around it, each takes 19.5 us (PyTorch 2.11, Intel Xeon, November 2026).
`triton_op` fails opcheck and fullgraph compilation on machines without a GPU.

Options that travel together are one frozen dataclass. `define_op` replaces such a parameter by its
fields in the schema, and every implementation receives the dataclass:

    reference(x: Tensor, options: Options) -> Tensor
    schema: (Tensor x, float scale, int window) -> Tensor
"""

import dataclasses
import functools
import inspect
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._compile import opaque, with_short_messages
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
    Returns: the operator. Give it a gradient with `register_autograd`.
    Raises: TypeError if the signature of `launch`, `shapes` or `composite` is not that of
        `reference`.
    """
    roles = {"launch": launch, "shapes": shapes, "composite": composite}
    for role, function in roles.items():
        if function and inspect.signature(function) != inspect.signature(reference):
            raise TypeError(
                f"define_op: {name}: {role} must have the signature of reference, "
                f"{inspect.signature(reference)}, got {inspect.signature(function)}"
            )
    # The schema, and the reference for fake tensors.
    schema = _Schema(reference)
    run_reference = _without_autocast(schema.flat(reference))
    signature = torch.library.infer_schema(run_reference, mutates_args=tuple(mutates))
    _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    run_fake = with_short_messages(run_reference if shapes is None else schema.flat(shapes))
    torch.library.register_fake(f"tritium::{name}", run_fake, lib=_LIBRARY)

    # The launcher for CUDA and for the interpreter, and the reference for all other devices.
    kernels = {"CompositeExplicitAutograd": run_reference}
    if launch is not None and HAS_TRITON:
        LAUNCHERS[name] = schema.flat(launch)
        public_name = name.removesuffix("_fwd").removesuffix("_bwd")
        run_launch = _without_autocast(_without_float64(public_name, LAUNCHERS[name]))
        kernels["CUDA"] = _on_device_of_tensors(run_launch)
        if INTERPRET:
            kernels["CPU"] = run_launch
    else:
        kernels["CUDA"] = _with_one_warning(name, run_reference)
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, opaque(kernel), key)
    composite = composite and _without_autocast(composite)
    return Op(name, schema, composite, composite_if)


class Op:
    """An operator made by `define_op`. Call it with the arguments of its reference."""

    def __init__(
        self,
        name: str,
        schema: "_Schema",
        composite: Callable | None,
        composite_if: Callable[..., bool],
    ):
        self._name = name
        self._overload = getattr(torch.ops.tritium, name).default
        self._has_gradient = False
        self._schema = schema
        self._composite = composite
        self._composite_if = composite_if

    def __call__(self, *args):
        """Run the composite on a CPU if there is one and it applies, else the operator."""
        # A custom operator costs Python calls around its forward and backward: a fifth of a small
        # model's step (width 128, 768 tokens, two threads of an Intel Xeon, November 2026).
        return self._composite(*args) if self.uses_composite(*args) else self.dispatch(*args)

    def uses_composite(self, *args) -> bool:
        """Whether a call with these arguments runs the composite."""
        return self._composite is not None and runs_reference(args[0]) and self._composite_if(*args)

    def dispatch(self, *args):
        """Run the registered operator, never the composite."""
        flat = self._schema.flatten(args)
        if forward_ad._current_level >= 0:  # inside torch.func.jvp or forward_ad.dual_level
            self._check_tangents(flat)
        if not self._has_gradient and torch.is_grad_enabled():
            return _WithoutGradient.apply(self._overload, *flat)
        return self._overload(*flat)

    def _check_tangents(self, args: Sequence) -> None:
        """Raise if an argument has a tangent. PyTorch would return a tangent of zero."""
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        if any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
            name = self._name.removesuffix("_fwd").removesuffix("_bwd")
            raise NotImplementedError(
                f"{name}: forward-mode derivatives are not supported; use backward() or "
                "torch.func.vjp"
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

        # Registered only for operators with a gradient: it adds 7 us to each call, also without
        # autograd (PyTorch 2.11, Intel Xeon, November 2026).
        self._has_gradient = True
        torch.library.register_autograd(
            f"tritium::{self._name}", flat_backward, setup_context=setup, lib=_LIBRARY
        )


class _WithoutGradient(torch.autograd.Function):
    """Call an operator without a gradient. A backward through it raises."""

    # torch.func.vmap calls the operator once for each example.
    generate_vmap_rule = True

    @staticmethod
    def forward(overload, *args):
        return overload(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = str(inputs[0])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name}: no autograd formula was registered")


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


def can_read_values(x: Tensor) -> bool:
    """Whether the values of `x` can be read without synchronizing with a device."""
    return x.device.type == "cpu"


def keep_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Replace gradients that are not needed by None.

    An operator must return a tensor for each output. It returns empty tensors for gradients that
    are not needed.
    """
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def public(function: Callable) -> Callable:
    """Check the arguments of a public operator against its annotations.

    Without this check Python would take True for a window of 1, and a wrong type would raise inside
    an implementation, with a message about another function. Floating-point tensors must have one
    of FLOATS, because PyTorch lacks many operations for other types, such as float8.

    Raises: ValueError that names the argument. Missing, repeated and unknown arguments raise
        Python's own TypeError.
    """
    parameters = inspect.signature(function).parameters
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    positional = [name for name, p in parameters.items() if p.kind is not keyword_only]
    accepted_types = {name: _accepted_types(p.annotation) for name, p in parameters.items()}

    @functools.wraps(function)
    def checked(*args, **options):
        for name, value in (*zip(positional, args, strict=False), *options.items()):
            if name not in accepted_types:
                continue  # the call below raises
            accepted = accepted_types[name]
            # bool is a subclass of int.
            is_stray_bool = type(value) is bool and bool not in accepted
            if not isinstance(value, accepted) or is_stray_bool:
                expected = inspect.formatannotation(parameters[name].annotation)
                raise ValueError(
                    f"{function.__name__}: {name} must be {expected.replace('torch.', '')}, "
                    f"got {_describe(value)}; convert it"
                )
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            if is_float and value.dtype not in FLOATS:
                expected = ", ".join(map(str, FLOATS)).replace("torch.", "")
                raise ValueError(
                    f"{function.__name__}: {name} must be one of {expected}, "
                    f"got {value.dtype}; cast it"
                )
        return function(*args, **options)

    return checked


def _accepted_types(annotation: object) -> tuple[type, ...]:
    """Types that an annotation such as `int | None` accepts."""
    alternatives = typing.get_args(annotation) or (annotation,)
    return tuple(type_ for name in alternatives for type_ in ACCEPTED_TYPES[name])


def _describe(value: object) -> str:
    """Describe a value for an error message. Never reads a tensor, which may be on a device."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (int, float, str, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"


def _without_autocast(function: Callable) -> Callable:
    """Disable autocast inside: references and launchers choose their own precision."""

    @functools.wraps(function)
    def run(*args):
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*args)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def _without_float64(name: str, launch: Callable) -> Callable:
    """Raise for float64: kernels compute in float32, so the result would be less accurate."""

    @functools.wraps(launch)
    def run(*args):
        for arg in args:
            if isinstance(arg, Tensor) and arg.dtype == torch.float64:
                raise TypeError(
                    f"{name}: the kernel takes float32, bfloat16 or float16, got float64; "
                    "move the tensors to the CPU"
                )
        return launch(*args)

    return run


def _on_device_of_tensors(launch: Callable) -> Callable:
    """Make the GPU of the tensors the current one, because Triton launches on the current GPU."""

    @functools.wraps(launch)
    def run(*args):
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def _with_one_warning(name: str, reference: Callable) -> Callable:
    """Warn at the first call that the reference runs on CUDA."""

    @functools.cache
    def warn():
        why = "has no Triton kernel yet" if HAS_TRITON else "needs Triton, which is not installed"
        warnings.warn(f"tritium: {name} {why}; CUDA runs its PyTorch reference", stacklevel=4)

    @functools.wraps(reference)
    def run(*args):
        warn()
        return reference(*args)

    return run
