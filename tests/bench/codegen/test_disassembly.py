"""Registers, spills and machine code of kernels, as the vendors' tools say them."""

import re

import pytest
import torch

from tests.bench.codegen.test_machine_code import _exponentials_kernel, product
from tritium.bench.codegen.disassembly import disassemblies, disassembly, resources
from tritium.bench.codegen.launches import TARGETS, compile_launch, record_launches
from tritium.bench.codegen.machine_code import hottest_loop

pytestmark = pytest.mark.codegen


def test_many_kernels_at_once_are_what_they_are_alone():
    """But for addresses, of instructions and of jumps: code stands behind code."""
    kernels = [
        product(torch.bfloat16, *case)
        for case in (("sm_90", 64), ("gfx942", 32), ("sm_80", 32), ("sm_90", 32))
    ]
    together = disassemblies(kernels)
    assert "v_mfma" in together[1]
    assert "HMMA.16816" in together[2]
    for index in (0, 3):
        many, one = together[index], disassembly(kernels[index])
        assert re.sub(r"/\*\w+\*/|BRA.*", "", many) == re.sub(r"/\*\w+\*/|BRA.*", "", one)
        loops = [[line.split("0x")[0] for line in hottest_loop(text)[0]] for text in (many, one)]
        assert loops[0] == loops[1]
        assert len(loops[0]) < one.count("\n")


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_kernel_has_few_registers_and_no_spills(target):
    x = torch.empty(128, device="meta")
    with record_launches(target) as launches:
        _exponentials_kernel[(1,)](x, n=3, BLOCK=128, num_warps=4)
    found = resources(compile_launch(launches[0], target))
    assert 0 < found.registers <= 64
    assert found.spilled_bytes == 0
