"""Write a safetensors file tensor by tensor.

The package safetensors needs all tensors of a file in memory, ready to write. A weight that the
file stores transposed would be in memory twice. Here only one tensor at a time is copied.

    file     length of the header, 8 bytes, little endian; header; the bytes of all tensors
    header   JSON: name -> dtype, shape, [begin, end) in the bytes of all tensors
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import names_file

# The dtypes of weights, and their names in the header.
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in any layout, on any device."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
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
    with names_file(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for value in tensors.values():
            flat = value.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy())
