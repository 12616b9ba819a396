import pytest
import torch

from tritium.bench.launches import TARGETS, compile_launch, record_launches
from tritium.bench.machine_code import resources
from tritium.kernels._triton import tl, triton

pytestmark = pytest.mark.codegen


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, nothing_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * factor, mask=offs < n)


@triton.jit
def _crowded_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Needs every row of x at once: far more values than a warp has registers."""
    offs = tl.arange(0, BLOCK)
    rows = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    sums = tl.sum(rows, axis=0)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], rows * tl.sum(rows * sums[None, :], axis=1)[:, None])


def recorded(kernel, *tensors, grid=(4,), **arguments):
    with record_launches() as launches:
        kernel[grid](*tensors, **arguments)
    return launches[0]


def test_launches_are_noted_and_not_run():
    x, y = torch.ones(100), torch.zeros(100)
    launch = recorded(_scale_kernel, x, y, n=100, factor=2.0, nothing_ptr=None, BLOCK=32, num_warps=1)
    assert torch.equal(y, torch.zeros(100))
    assert launch.grid == (4,)
    assert launch.kernel is _scale_kernel
    assert launch.arguments["n"] == 100
    assert launch.arguments["num_warps"] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_machine_code_and_its_resources(target):
    x = torch.empty(128, device="meta", dtype=torch.bfloat16)
    launch = recorded(_scale_kernel, x, x, n=128, factor=2.0, nothing_ptr=None, BLOCK=32, num_warps=1)
    compiled = compile_launch(launch, target)
    assert ("cubin" if target.startswith("sm") else "amdgcn") in compiled.asm
    found = resources(compiled)
    assert 0 < found.registers <= 64
    assert found.spilled_bytes == 0


def test_alignment_and_ones_are_specialized_as_at_run_time():
    x = torch.empty(1024, device="meta")
    aligned, odd, one = (
        compile_launch(recorded(_scale_kernel, x, x, n=n, factor=2.0, nothing_ptr=None, BLOCK=1024, num_warps=1), "sm_90").asm
        for n in (1024, 1021, 1)
    )
    assert "ld.global.v4" in aligned["ptx"]
    assert "ld.global.v4" not in odd["ptx"]
    assert "%arg2" not in one["ttir"].split(")")[0] or "n:" not in one["ttir"]


@pytest.mark.parametrize(("target", "width"), [("sm_90", 128), ("gfx942", 256)])
def test_a_planted_spill_is_seen(target, width):
    x = torch.empty(width, width, device="meta")
    launch = recorded(_crowded_kernel, x, x, BLOCK=width, num_warps=1, grid=(1,))
    assert resources(compile_launch(launch, target)).spilled_bytes > 0
