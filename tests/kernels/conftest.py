"""What tests of products and of what is built on them share."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp import _gemm


@pytest.fixture
def small_tile() -> _gemm.Tile:
    """So small that tests have several in each direction, with an epilogue in four parts."""
    return _gemm.Tile(block_m=16, block_n=64, block_k=16, parts=4, num_warps=4, num_stages=2)


# Where references run there is nothing to choose.
@pytest.fixture(params=["fused", "cublas"] if INTERPRET or torch.cuda.is_available() else ["auto"])
def products(request, small_tile, monkeypatch) -> str:
    """Of public functions: products of ours, of several tiles, with what follows them, or cuBLAS's and kernels between them."""
    monkeypatch.setattr(_gemm, "plan", lambda *_, **__: (small_tile, request.param == "fused"))
    return request.param
