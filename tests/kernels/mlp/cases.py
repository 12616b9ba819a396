"""Cases that the tests of linear and of the MLPs share."""

import torch

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Rows, width, feed-forward width: one element, odd sizes, one past a tile, four times the width.
SHAPES = [(1, 1, 1), (5, 1, 3), (17, 129, 65), (32, 16, 64)]


def randn(shapes, seed, dtype, device):
    """Return normally distributed tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def double(values):
    return [None if value is None else value.double() for value in values]


def run(function, inputs, incoming, **options):
    """Return the output, and the gradients of those inputs that are not None."""
    inputs = [None if value is None else value.detach().requires_grad_() for value in inputs]
    y = function(*inputs, **options)
    leaves = [value for value in inputs if value is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype))]


def transposed(value):
    """Return the same values in column-major order."""
    return value.t().contiguous().t()


def saved_shapes(function, *args, **options):
    """Sorted shapes of the tensors that autograd keeps for the backward."""
    shapes = []

    def pack(value):
        shapes.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        function(*args, **options)
    return sorted(shapes)


# Arguments named x that every operator rejects, and the message.
BAD_X = [
    (torch.ones(()), r"x must be floating point \(\.\.\., D\) with D at least 1, got .* \(\)"),
    (torch.ones(2, 0), r"x must be floating point .*, got torch.float32 \(2, 0\)"),
    (torch.ones(2, 4, dtype=torch.long), r"x must be floating point .*, got torch.int64 \(2, 4\)"),
]
