import pytest

from tritium.kernels.core.triton import cdiv, next_power_of_2

pytestmark = pytest.mark.plain


def test_cdiv_and_next_power_of_2():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1600)] == [1, 1, 2, 4, 4, 8, 2048]


def test_results_equal_those_of_triton():
    triton = pytest.importorskip("triton")
    for n in range(1, 300):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert cdiv(n, 7) == triton.cdiv(n, 7)
