import re

import pytest
import torch

from tests.bench.codegen.test_machine_code import matmul
from tritium.bench.codegen.disassembly import disassemblies, disassembly

pytestmark = pytest.mark.codegen


def test_disassembling_several_kernels_at_once_gives_the_same_code():
    """Except for the addresses of instructions and jumps."""
    cases = (("sm_90", 64), ("gfx942", 32), ("sm_80", 32), ("sm_90", 32))
    kernels = [matmul(torch.bfloat16, *case) for case in cases]
    together = disassemblies(kernels)
    assert "v_mfma" in together[1]
    assert "HMMA.16816" in together[2]
    for index in (0, 3):
        texts = together[index], disassembly(kernels[index])
        first, second = (re.sub(r"/\*\w+\*/|BRA.*", "", text) for text in texts)
        assert first == second
