"""tritium bench errors: measure the errors of operators against float64, in three dtypes.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, otherwise the references of a CPU.
Each operator runs at its `tiny_shape`, which takes the interpreter about a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.core.op import INTERPRET
from ...train.commands.cli import parse
from ..interpreter import repair_dot_of_16_bits, repair_rounding_to_bfloat16
from ..ops import OPERATORS
from ..ops.case import Operator
from ..ops.check import results, truth_of
from ..record import check_writable, write_record

# Name of the implementation whose matmuls are kernels of this package.
FUSED = "tritium, fused"
RUNS = "interpreter" if INTERPRET else "reference"
KEYS = ("operator", "implementation", "shape", "dtype", "value")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ErrorOptions:
    """Options of `tritium bench errors`."""

    out: str | None = None
    """Also write the errors to this file, as JSON."""


def measure(operator: Operator, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the largest error of each output and gradient.

    Errors are relative to the largest magnitude of the float64 truth. The interpreter also runs
    the GEMMs with an epilogue, which plan() does not choose at this size.
    """
    shape = operator.tiny_shape
    calls = {"tritium": operator.ours}
    if INTERPRET:
        calls |= {each.name: each.call for each in operator.others if each.name == FUSED}
    truth = truth_of(operator, shape, dtype, torch.device("cpu"))

    def error(value: Tensor, expected: Tensor) -> float:
        return ((value.double() - expected).abs().max() / expected.abs().max()).item()

    return [
        {
            "operator": operator.name,
            "shape": operator.label(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "implementation": implementation,
            "value": name,
            "error": error(got[name], expected),
            "pytorch_error": error(truth.eager[name], expected),
        }
        for implementation, call in calls.items()
        for got in (results(call, truth.inputs, truth.output_grads)[0],)
        for name, expected in truth.expected.items()
    ]


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench errors`. Returns: exit status."""
    options = parse(ErrorOptions, argv, prog="tritium bench errors", description=__doc__)
    out = check_writable(options.out)
    if INTERPRET:
        repair_rounding_to_bfloat16()
        repair_dot_of_16_bits()
    rows = []
    for operator in OPERATORS.values():
        for dtype in DTYPES:
            for row in measure(operator, dtype):
                rows.append(row)
                keys = " ".join(row[key] for key in KEYS)
                print(f"{keys}: {row['error']:.1e}, PyTorch {row['pytorch_error']:.1e}")
    if out:
        write_record(out, "errors", {"runs": RUNS, "rows": rows})
    return 0
