import pytest
import torch

from tritium.kernels.core import device as device_module
from tritium.kernels.core.layout import as_rows, descriptor, like_rows_of, strides_bth, wide

pytestmark = pytest.mark.plain


def test_wide_gives_at_least_float32():
    for dtype, expected in [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ]:
        assert wide(torch.ones(2, dtype=getattr(torch, dtype))).dtype == getattr(torch, expected)


def test_as_rows_copies_only_if_no_view_is_possible():
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


def test_like_rows_of_restores_leading_axes():
    y = torch.arange(12.0).view(6, 2)
    assert torch.equal(like_rows_of(torch.ones(2, 3, 5), y), y.view(2, 3, 2))
    assert like_rows_of(torch.ones(6, 5), y) is y
    assert torch.equal(like_rows_of(torch.ones(5), y[:1]), y[0])


def test_strides_bth_names_the_arguments_of_a_launch():
    q = torch.ones(2, 3, 4, 5)
    assert strides_bth(q=q, k=q.transpose(1, 2)) == {
        "stride_qb": 60,
        "stride_qt": 20,
        "stride_qh": 5,
        "stride_kb": 60,
        "stride_kt": 5,
        "stride_kh": 20,
    }


def test_descriptor_describes_aligned_tensors_for_tma():
    pytest.importorskip("triton")
    x = torch.empty(4, 6, 16, dtype=torch.bfloat16)
    tma = descriptor(x[:, ::2], [1, 2, 16])
    assert tma.base.shape == (4, 3, 16)
    assert tma.strides == [96, 32, 1]
    assert tma.block_shape == [1, 2, 16]
    # The stride of an axis of length 1 does not matter.
    single = x.as_strided((1, 6, 16), (1, 16, 1))
    assert descriptor(single, [1, 2, 16]) is not single


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(4, 17, dtype=torch.bfloat16),  # rows do not start at multiples of 16 bytes
        torch.empty(4, 32, dtype=torch.bfloat16)[:, 1:17],  # neither does the first element
        torch.empty(4, 16, 2)[..., 0],  # no unit last stride
        torch.empty(1, 16).expand(4, 16),  # a stride of 0
        torch.empty(0, 16),
    ],
    ids=["row stride", "address", "column stride", "expanded", "empty"],
)
def test_descriptor_returns_tensors_that_tma_cannot_load(x):
    assert descriptor(x, [2, 16]) is x


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_descriptor_returns_the_tensor_on_architectures_without_tma(arch, monkeypatch):
    monkeypatch.setattr(device_module, "DEFAULT_ARCH", arch)
    x = torch.empty(4, 16)
    assert descriptor(x, [2, 16]) is x
