"""The examples with kernels. The custom kernel runs in Triton's interpreter too."""

import re

import pytest
import torch

from tritium.kernels.core.op import INTERPRET


@pytest.mark.plain
def test_a_model_with_the_kernels_learns(example):
    losses = example("kernels_in_your_model").main(steps=6)
    assert losses[-1] < losses[0]


@pytest.mark.plain
def test_a_patched_gpt2_has_the_same_loss_gradient_and_text(example):
    before, after = example("faster_hugging_face").main(batch=1, context=16)
    for name in ("loss", "gradient"):
        assert after[name] == pytest.approx(before[name], rel=1e-5)
    assert after["text"] == before["text"]


def test_a_custom_kernel_passes_its_checks(example, capsys):
    module = example("custom_kernel")
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("kernels" if INTERPRET or torch.cuda.is_available() else "reference")
    assert "opcheck: SUCCESS" in lines
    assert all(re.search(": (True|SUCCESS)$", line) for line in lines[1:])
    with pytest.raises(ValueError, match=r"gated_relu2: up must have the shape .* of gate"):
        module.gated_relu2(torch.zeros(2), torch.zeros(3))
