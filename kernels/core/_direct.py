"""Call an implementation in eager mode without PyTorch's dispatcher.

A custom operator costs Python calls around its forward and its backward: the dispatcher, the schema
and PyTorch's own autograd function. None of them does anything for a plain eager call, so such a
call goes straight to the implementation that is registered for its device. The registered operator
runs if anything may watch or change the call, such as torch.compile, fake tensors, a profiler or
torch.func. docs/kernels.md has the times.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_is_profiled = torch.autograd._profiler_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_is_key_active = torch._C._dispatch_tls_is_dispatch_key_included
_LEGACY_VMAP = torch._C._dispatch_key_parse("VmapMode")
_mode = torch._C._get_dispatch_mode
_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, such as grad or vmap."""
    return _transform() is not None


def is_symbolic(x: Tensor) -> bool:
    """Whether `x` stands for any values: a fake tensor, or one in make_fx or torch.jit.trace."""
    if isinstance(x, FakeTensor) or _trace() is not None:
        return True
    return _dispatch_modes() > 0 and any(_mode(key) is not None for key in _TRACING_MODES)


def device_of(args: Sequence) -> str | None:
    """Return the type of device of the first tensor if the call may be direct, else None.

    Operators check that their tensors are on one device. A tensor in an options dataclass is a seed
    and need not be looked at.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    if _dispatch_modes() or _transform() is not None or _is_profiled() or _trace() is not None:
        return None
    # torch.autograd.grad(is_grads_batched=True) has a vmap of its own, older than that of
    # torch.func. This check costs 0.1 us per call. A check of each tensor would cost as much each.
    if _is_key_active(_LEGACY_VMAP):
        return None
    device = None
    for arg in args:
        type_ = type(arg)
        if type_ is Tensor or type_ is Parameter:
            # `device` takes a microsecond (November 2026).
            device = device or arg.device.type
        elif isinstance(arg, Tensor):  # a subclass may define what operators do to it
            return None
    return device


def needs_gradient(args: Sequence) -> bool:
    """Whether autograd must record a call with these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def eager_function(
    implementation: Callable, backward: Callable, setup_context: Callable
) -> type[torch.autograd.Function]:
    """Return a function of autograd for direct calls of an implementation."""

    class Eager(torch.autograd.Function):
        # No method setup_context: with one, `apply` would inspect the signature at each call.
        @staticmethod
        def forward(ctx, *args):
            output = implementation(*args)
            setup_context(ctx, args, output)
            return output

    Eager.backward = staticmethod(backward)
    return Eager


def transformed_function(
    operator: Callable, backward: Callable, setup_context: Callable
) -> type[torch.autograd.Function]:
    """Return a function of autograd that torch.func can transform. It calls the operator."""

    class Transformed(torch.autograd.Function):
        # torch.func.vmap calls the operator once for each example.
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

    Transformed.setup_context = staticmethod(setup_context)
    Transformed.backward = staticmethod(backward)
    return Transformed


class WithoutGradient(torch.autograd.Function):
    """Call an implementation or an operator that has no gradient. A backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, function, *args):
        return function(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name}: no autograd formula was registered")
