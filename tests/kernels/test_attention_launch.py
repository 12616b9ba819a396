"""What causal attention launches: kernels that compile at sizes of one, where Triton makes constants of integer arguments."""

import pytest
import torch

from tritium.bench.launches import compile_launch, record_launches
from tritium.kernels._attention_launch import launch_bwd, launch_fwd

pytestmark = pytest.mark.codegen


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("T", "S", "documents", "window", "dropout_p"),
    [(1, 1, 0, 1, 0.0), (1, 300, 0, 300, 0.0), (1, 300, 0, 1, 0.1), (1, 1, 1, 1, 0.0), (1, 1, 2, 1, 0.1)],
)
def test_one_of_everything_compiles(T, S, documents, window, dropout_p):
    q, k, lse = meta(1, T, 1, 16), meta(1, S, 1, 16), meta(1, 1, T, dtype=torch.float32)
    cu_seqlens = meta(documents + 1, dtype=torch.int32) if documents else None
    seed = meta(dtype=torch.int64) if dropout_p else None
    options = (cu_seqlens, seed, 0.25, window, 0.0, dropout_p)
    with record_launches("sm_90") as launches:
        launch_fwd(q, k, k, *options)
        launch_bwd(q, lse, q, k, k, q, lse, *options)
    names = {launch.kernel.__name__ for launch in launches}
    assert len(names) == (4 if documents else 3)
    for launch in launches:
        assert "cubin" in compile_launch(launch, "sm_90").asm, launch.kernel.__name__
