"""A kernel of your own as an operator: reference, kernels, launchers, gradient, checks.

    python examples/custom_kernel.py
    TRITON_INTERPRET=1 python examples/custom_kernel.py     runs the kernels on a CPU

The operator is a gated squared ReLU, the activation of an MLP with two branches:

    forward    y = relu(gate)^2 up
    backward   dgate = 2 relu(gate) up dy       dup = relu(gate)^2 dy

Shapes     gate, up, y and their gradients: any shape, the same for all
Precision  any float dtype in, the same dtype out; float32 in between
Cost       memory-bound: forward 3, backward 5 tensors read or written once; PyTorch needs 7 and 14

Four steps make an operator: a reference in PyTorch, kernels, launchers with the signature of the
reference, and `define_op`, which joins them. CPUs run the reference, GPUs the kernels, and
torch.compile takes shapes and dtypes from the reference. The output on a CPU:

    cpu: reference
    gradients match finite differences: True
    output and gradients match PyTorch: True
    opcheck: SUCCESS
    one graph under torch.compile: True
"""

import torch
from torch import Tensor

from tritium.kernels.core.launch import launch_kernel
from tritium.kernels.core.op import INTERPRET, define_op, public
from tritium.kernels.core.triton import cdiv, tl, triton

# --- 1. reference: the definition; CPUs run it, and tests compare the kernels with it


def reference_fwd(gate: Tensor, up: Tensor) -> Tensor:
    return (_wide(gate).relu().square() * up).to(gate.dtype)


def reference_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    relu = _wide(gate).relu()
    return (2 * relu * up * dy).to(gate.dtype), (relu.square() * dy).to(up.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return x in float32. float64 stays, so that gradcheck can test the math."""
    return x if x.dtype == torch.float64 else x.float()


# --- 2. kernels: one program computes BLOCK elements


@triton.jit
def _fwd_kernel(gate_ptr, up_ptr, y_ptr, N, BLOCK: tl.constexpr):
    # int64: a tensor can have more than 2^31 elements.
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N  # the last block may reach past N
    relu = tl.maximum(tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32), 0.0)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (relu * relu * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    relu = tl.maximum(tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32), 0.0)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + offs, (2 * relu * up * dy).to(dtype), mask=mask)
    tl.store(dup_ptr + offs, (relu * relu * dy).to(dtype), mask=mask)


# --- 3. launchers: allocate and launch; the signatures are those of the references

BLOCK = 1_024


def launch_fwd(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    N = y.numel()
    if N:
        launch_kernel(
            _fwd_kernel, (cdiv(N, BLOCK),), gate_ptr=gate, up_ptr=up, y_ptr=y, N=N, BLOCK=BLOCK
        )
    return y


def launch_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate)
    dup = torch.empty_like(up)
    N = dy.numel()
    if N:
        tensors = {"dy_ptr": dy, "gate_ptr": gate, "up_ptr": up}
        gradients = {"dgate_ptr": dgate, "dup_ptr": dup}
        launch_kernel(_bwd_kernel, (cdiv(N, BLOCK),), **tensors, **gradients, N=N, BLOCK=BLOCK)
    return dgate, dup


# --- 4. operator: torch.ops.tritium.gated_relu2_fwd and _bwd, and the gradient that joins them

_fwd = define_op("gated_relu2_fwd", launch=launch_fwd, reference=reference_fwd)
_bwd = define_op("gated_relu2_bwd", launch=launch_bwd, reference=reference_bwd)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad(ctx, dy):
    return _bwd(dy.contiguous(), *ctx.saved_tensors)


_fwd.register_autograd(_grad, setup_context=_save)


@public  # checks the type of each argument
def gated_relu2(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply `up` by the squared ReLU of `gate`.

    Args: gate, up: the same shape, dtype and device.
    Returns: the shape and dtype of `gate`.
    Raises: ValueError if the arguments do not match.
    """
    for name in ("shape", "dtype", "device"):
        if getattr(gate, name) != getattr(up, name):
            raise ValueError(
                f"gated_relu2: up must have the {name} {getattr(gate, name)} of gate, "
                f"got {getattr(up, name)}"
            )
    return _fwd(gate.contiguous(), up.contiguous())


# --- checks


def in_pytorch(gate: Tensor, up: Tensor) -> Tensor:
    return torch.relu(gate).square() * up


def run(function, gate: Tensor, up: Tensor) -> list[Tensor]:
    """Return the output and the gradients."""
    leaves = [each.detach().clone().requires_grad_() for each in (gate, up)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def main() -> None:
    """Check the operator as the operators of tritium are checked."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}: {'kernels' if device == 'cuda' or INTERPRET else 'reference'}")

    if not INTERPRET:  # kernels take no float64
        inputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
        print("gradients match finite differences:", torch.autograd.gradcheck(gated_relu2, inputs))

    for shape in ((1,), (3, 5), (2, BLOCK + 1), (0, 4)):  # one past a block, and empty
        gate, up = torch.randn(2, *shape, device=device)
        torch.testing.assert_close(run(gated_relu2, gate, up), run(in_pytorch, gate, up))
    print("output and gradients match PyTorch: True")

    found = torch.library.opcheck(
        torch.ops.tritium.gated_relu2_fwd.default,
        torch.randn(2, 4, 8, device=device, requires_grad=True).unbind(),
    )
    print("opcheck:", ", ".join(sorted(set(found.values()))))

    compiled = torch.compile(gated_relu2, fullgraph=True, backend="aot_eager")
    same = torch.equal(compiled(gate, up), gated_relu2(gate, up))
    print("one graph under torch.compile:", same)


if __name__ == "__main__":
    main()
