"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which computes wrongly in 16 bits.

The functions change Triton in this process. Call each once.
"""

import numpy as np


def repair_rounding_to_bfloat16() -> None:
    """Round float32 to the nearest bfloat16, as GPUs do. The interpreter truncates instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_and_round(data, source, target, mode):
        if not (source == tl.float32 and target == tl.bfloat16):
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # Adding to the mantissa of a NaN could give an infinity or zero.
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    interpreter._convert_float = convert_and_round


def repair_dot_of_16_bits() -> None:
    """Compute tl.dot of 16-bit operands in float32.

    The interpreter multiplies the bits of bfloat16 as integers, which is wrong. It multiplies
    float16 without a BLAS library, which is slow.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def in_float32(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(
                (handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32
            )
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)

    def create_float32_dot(self, a, b, *rest):
        return create_dot(self, in_float32(a), in_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_float32_dot
