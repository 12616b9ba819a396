import pytest
import torch

from tests.tolerance import assert_accurate
from tritium.kernels.core.matmul import autocast, matmul_out


@pytest.mark.plain
def test_autocast_casts_floats_except_float64():
    operands = (
        torch.ones(2),
        None,
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.int64),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = autocast(*operands)
    dtypes = [None if operand is None else operand.dtype for operand in cast]
    assert dtypes == [torch.bfloat16, None, torch.float64, torch.int64]


@pytest.mark.plain
def test_without_autocast_operands_come_back_unchanged():
    operands = (torch.ones(2), None, torch.ones(2, dtype=torch.float16))
    assert autocast(*operands) == operands
    with torch.autocast("cpu", enabled=False):
        assert autocast(*operands) == operands


@pytest.mark.plain
def test_autocast_of_another_device_type_changes_nothing():
    x = torch.ones(2, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast(x) == (x,)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_out_sums_in_float32(dtype, accumulate, device):
    """The bar is for float32: a result that was rounded to 16 bits would fail."""
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((5, 300), (300, 7)))
    before = torch.randn(5, 7, device=device) if accumulate else torch.zeros(5, 7, device=device)
    out = before.clone()
    matmul_out(a, b, out, accumulate=accumulate)
    truth = before.double() + a.double() @ b.double()
    assert_accurate("out", out, truth, before + a.float() @ b.float(), length=300, scale=300**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_overwritten_even_if_it_is_nan(dtype, device):
    a, b = (torch.ones(size, dtype=dtype, device=device) for size in ((2, 3), (3, 4)))
    for out_dtype in (dtype, torch.float32):
        out = torch.full((2, 4), torch.nan, dtype=out_dtype, device=device)
        matmul_out(a, b, out)
        assert torch.equal(out, torch.full_like(out, 3))


def test_operands_and_out_may_be_strided(device):
    a, b = (torch.randn(size, device=device) for size in ((3, 5), (3, 4)))
    rows = torch.zeros(2, 5, 4, device=device)
    matmul_out(a.t(), b, rows[1])
    torch.testing.assert_close(rows[1], a.t() @ b)
    assert not rows[0].any()


@pytest.mark.plain
def test_accumulate_reaches_the_matmul_of_a_gpu(monkeypatch):
    """Meta tensors take the branch of CUDA tensors. They have no values, so record the call."""
    betas = []
    monkeypatch.setattr(torch, "addmm", lambda *args, beta, **options: betas.append(beta))
    a = torch.empty(3, 3, dtype=torch.bfloat16, device="meta")
    for accumulate in (False, True):
        matmul_out(a, a, torch.empty(3, 3, device="meta"), accumulate=accumulate)
    assert betas == [0, 1]
