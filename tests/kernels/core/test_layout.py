import pytest
import torch

from tritium.kernels.core.layout import as_rows, wide

pytestmark = pytest.mark.plain


def test_wide_is_at_least_float32():
    for dtype, expected in [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ]:
        assert wide(torch.ones(2, dtype=getattr(torch, dtype))).dtype == getattr(torch, expected)


def test_rows_are_views_where_they_can_be():
    x = torch.arange(48.0).view(2, 3, 8)
    for view in (x, x[:, :, :5], x[0], x[0, 0]):
        rows = as_rows(view)
        assert rows.shape == (view.numel() // view.shape[-1], view.shape[-1])
        assert rows.data_ptr() == view.data_ptr()
        assert torch.equal(rows, view.reshape(rows.shape))
    for strided in (x.transpose(1, 2), x[..., ::2]):
        rows = as_rows(strided)
        assert rows.stride(-1) == 1
        assert torch.equal(rows, strided.reshape(rows.shape))
