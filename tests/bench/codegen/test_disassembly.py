import re

import pytest
import torch

from tests.bench.codegen.test_machine_code import _exponentials_kernel, compiled, matmul
from tritium.bench.codegen.disassembly import disassemblies, disassembly, resources
from tritium.bench.codegen.launches import TARGETS
from tritium.bench.codegen.machine_code import hottest_loop

pytestmark = pytest.mark.codegen


def test_disassembling_several_kernels_at_once_gives_the_same_code():
    """Except for the addresses of instructions and jumps."""
    cases = (("sm_90", 64), ("gfx942", 32), ("sm_80", 32), ("sm_90", 32))
    kernels = [matmul(torch.bfloat16, *case) for case in cases]
    together = disassemblies(kernels)
    assert "v_mfma" in together[1]
    assert "HMMA.16816" in together[2]
    for index in (0, 3):
        alone = disassembly(kernels[index])
        texts = together[index], alone
        first, second = (re.sub(r"/\*\w+\*/|BRA.*", "", text) for text in texts)
        assert first == second
        first, second = ([line.split("0x")[0] for line in hottest_loop(text)] for text in texts)
        assert first == second
        assert len(first) < alone.count("\n")


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_kernel_has_few_registers_and_no_spills(target):
    x = torch.empty(128, device="meta")
    found = resources(compiled(_exponentials_kernel, target, x, n=3, BLOCK=128))
    assert 0 < found.registers <= 64
    assert found.spilled_bytes == 0
