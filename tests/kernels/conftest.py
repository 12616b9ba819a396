"""Fixtures of tests that run GEMMs with an epilogue."""

import pytest
import torch

from tritium.kernels.core.op import INTERPRET
from tritium.kernels.mlp import gemm


@pytest.fixture
def small_tile() -> gemm.Tile:
    """A tile so small that tests have several tiles per axis. Its epilogue has four parts."""
    return gemm.Tile(block_m=16, block_n=64, block_k=16, parts=4, num_warps=4, num_stages=2)


# Only launchers choose between the two. A reference runs once.
@pytest.fixture(params=["fused", "cublas"] if INTERPRET or torch.cuda.is_available() else ["auto"])
def matmul(request, small_tile, monkeypatch) -> str:
    """Make public functions use the fused GEMM with several tiles, or cuBLAS."""
    monkeypatch.setattr(gemm, "plan", lambda *_, **__: (small_tile, request.param == "fused"))
    return request.param
