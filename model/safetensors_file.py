"""Write a safetensors file tensor by tensor.

The package safetensors needs all tensors of a file in memory, ready to write. A weight that the
file stores transposed would be in memory twice. Here only one tensor at a time is copied, and
contiguous tensors on the CPU are not copied at all.

    file     length of the header, 8 bytes, little endian; header; the bytes of all tensors
    header   JSON: name -> dtype, shape, [begin, end) in the bytes of all tensors
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import names_file

# The dtypes of weights, and their names in the header.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def safetensors_header(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return all bytes before those of the first tensor.

    Args: metadata: more entries of the header's `__metadata__`.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, value in tensors.items():
        begin = end
        end += value.nbytes
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors: align them to 8 bytes
    return len(text).to_bytes(8, "little") + text


def flat_bytes(value: Tensor) -> Tensor:
    """Return the bytes of a tensor as they are in the file: uint8, 1D, on the tensor's device."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def safetensors_pieces(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file: the header, then one piece per tensor.

    Args:
        tensors: in any layout, on any device. They must not change before the last piece.
        metadata: as for safetensors_header.
    """
    yield safetensors_header(tensors, metadata)
    for value in tensors.values():
        yield flat_bytes(value.cpu()).numpy().data


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors in any layout, on any device. metadata: as for safetensors_header."""
    with names_file(path), open(path, "wb") as file:
        for piece in safetensors_pieces(tensors, metadata):
            file.write(piece)
