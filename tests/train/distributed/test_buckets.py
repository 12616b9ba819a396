"""Buckets of gradients, with an all-reduce that stands for two equal ranks."""

import pytest
import torch
from torch import nn

from tritium.train.distributed import buckets
from tritium.train.distributed.buckets import GradientBuckets

pytestmark = pytest.mark.plain


class Work:
    """A pending all-reduce of two equal ranks. `wait` replaces the tensor by the sum."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def wait(self) -> None:
        self.tensor *= 2


@pytest.fixture
def started(monkeypatch) -> list[int]:
    """Sizes of the all-reduces, in the order in which they start. A bucket is 40 bytes."""
    sizes = []

    def all_reduce(tensor, async_op):
        sizes.append(tensor.numel())
        return Work(tensor)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 40)
    return sizes


def test_parameters_fill_buckets_in_reverse_order(started):
    parameters = [nn.Parameter(torch.ones(size)) for size in (3, 20, 4, 6)]
    gradients = GradientBuckets(parameters, 2)
    gradients.begin_step()
    gradients.begin_last_backward()
    gradients.finish()
    assert started == [10, 20, 3]


def test_buckets_start_in_order_even_if_they_are_complete_in_another(started):
    first, second, third = (nn.Parameter(torch.ones(size)) for size in (7, 8, 9))
    gradients = GradientBuckets([first, second, third], 2)
    gradients.begin_step()
    gradients.begin_last_backward()
    gradients.gradient_added(first)
    gradients.gradient_added(second)
    assert started == []
    gradients.gradient_added(third)
    assert started == [9, 8, 7]


def test_no_bucket_starts_before_the_last_backward(started):
    first, second = (nn.Parameter(torch.ones(size)) for size in (7, 8))
    gradients = GradientBuckets([first, second], 2)
    for _ in range(2):
        started.clear()
        gradients.begin_step()
        gradients.gradient_added(first)  # This backward is not the last one.
        gradients.gradient_added(second)
        assert started == []
        gradients.begin_last_backward()
        gradients.finish()
        assert started == [8, 7]


def test_gradients_are_averages_and_start_at_zero_in_each_step(started):
    parameters = [nn.Parameter(torch.ones(size, size)) for size in (2, 3)]
    gradients = GradientBuckets(parameters, 2)
    for _ in range(2):
        gradients.begin_step()
        gradients.begin_last_backward()
        sum((parameter * 3).sum() for parameter in parameters).backward()
        gradients.finish()
        for parameter in parameters:
            assert torch.equal(parameter.grad, torch.full_like(parameter, 3))
            parameter.grad = None
