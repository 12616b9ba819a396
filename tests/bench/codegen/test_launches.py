import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tritium.bench.codegen.disassembly import resources
from tritium.bench.codegen.launches import (
    compile_launch,
    record_launches,
)
from tritium.kernels.core import device as _device
from tritium.kernels.core.triton import tl, triton

pytestmark = pytest.mark.codegen


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, nothing_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) * factor, mask=offs < n)


@triton.jit
def _crowded_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keep every row of x at once: far more values than a warp has registers."""
    offs = tl.arange(0, BLOCK)
    rows = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    sums = tl.sum(rows, axis=0)
    tl.store(
        y_ptr + offs[:, None] * BLOCK + offs[None, :],
        rows * tl.sum(rows * sums[None, :], axis=1)[:, None],
    )


@triton.jit
def _descriptor_kernel(a_desc, b_desc, c_ptr, BLOCK: tl.constexpr):
    """One tile of a b^T for one head: a, b (B, T, H, 64) in blocks of (1, BLOCK, 1, 64)."""
    a = a_desc.load([0, 0, 1, 0]).reshape(BLOCK, 64)
    b = b_desc.load([0, 0, 1, 0]).reshape(BLOCK, 64)
    offs = tl.arange(0, BLOCK)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(a, b.T))


@triton.jit
def _twice(x):
    return x * 2


@triton.jit(do_not_specialize=["n"])
def _apply_kernel(x_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr = 32):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, FUNCTION(tl.load(x_ptr + offs, mask=offs < n)))


def recorded(kernel, *tensors, grid=(4,), arch="sm_90", **arguments):
    with record_launches(arch) as launches:
        kernel[grid](*tensors, **arguments)
    return launches[0]


def test_launches_are_recorded_and_not_run():
    x, y = torch.ones(100), torch.zeros(100)
    launch = recorded(
        _scale_kernel, x, y, n=100, factor=2.0, nothing_ptr=None, BLOCK=32, num_warps=1
    )
    assert torch.equal(y, torch.zeros(100))
    assert launch.grid == (4,)
    assert launch.kernel is _scale_kernel
    assert launch.arguments["n"] == 100
    assert launch.arguments["num_warps"] == 1


def test_an_argument_that_a_gpu_would_not_accept_raises():
    with pytest.raises(KeyError, match="_apply_kernel: unknown argument STAGES"):
        recorded(_apply_kernel, torch.ones(1), STAGES=1)


def test_aligned_sizes_and_ones_are_specialized_as_at_run_time():
    x = torch.empty(1024, device="meta")
    aligned, odd, one = (
        compile_launch(
            recorded(
                _scale_kernel, x, x, n=n, factor=2.0, nothing_ptr=None, BLOCK=1024, num_warps=1
            ),
            "sm_90",
        ).asm
        for n in (1024, 1021, 1)
    )
    assert "ld.global.v4" in aligned["ptx"]
    assert "ld.global.v4" not in odd["ptx"]
    assert "%arg2" not in one["ttir"].split(")")[0] or "n:" not in one["ttir"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_reported(target):
    x = torch.empty(128, 128, device="meta")
    # Eight wavefronts per SIMD leave each lane 64 of AMD's 512 registers.
    launch = recorded(_crowded_kernel, x, x, BLOCK=128, num_warps=1, waves_per_eu=8, grid=(1,))
    assert resources(compile_launch(launch, target)).spilled_bytes > 0


def test_launchers_plan_for_the_architecture():
    device, before = torch.device("meta"), _device.DEFAULT_ARCH
    with record_launches("gfx942"):
        assert _device.arch(device) == "gfx942"
    assert _device.arch(device) == before
    with pytest.raises(ZeroDivisionError), record_launches("sm_80"):
        _ = 1 // 0
    assert _device.arch(device) == before


def test_a_descriptor_is_recorded_as_it_was_at_the_launch():
    x = torch.empty(2, 128, 3, 64, device="meta", dtype=torch.bfloat16)
    c = torch.empty(64, 64, device="meta")
    tiles = TensorDescriptor.from_tensor(x, [1, 64, 1, 64])
    with record_launches("sm_90") as launches:
        for rows in (64, 128):
            tiles.block_shape = [1, rows, 1, 64]
            _descriptor_kernel[(1,)](tiles, tiles, c, BLOCK=rows)
    assert [launch.arguments["a_desc"].block_shape[1] for launch in launches] == [64, 128]


def test_function_arguments_defaults_and_callable_grids():
    x = torch.empty(128, device="meta")
    launch = recorded(
        _apply_kernel,
        x,
        n=1,
        FUNCTION=_twice,
        grid=lambda arguments: (arguments["n"], 2),
        num_warps=2,
    )
    assert launch.grid == (1, 2)
    compiled = compile_launch(launch, "sm_90")
    assert compiled.metadata.num_warps == 2
    assert "%n: i32" in compiled.asm["ttir"], "n is not specialized"
    assert "tensor<32xf32>" in compiled.asm["ttir"]
    with pytest.raises(KeyError, match="FUNCTION"):
        compile_launch(recorded(_apply_kernel, x, n=1), "sm_90")


def test_each_backend_gets_its_own_options():
    x = torch.empty(128, device="meta")
    launch = recorded(
        _apply_kernel, x, n=1, FUNCTION=_twice, num_warps=4, maxnreg=40, waves_per_eu=3
    )
    assert compile_launch(launch, "sm_90").metadata.maxnreg == 40
    assert compile_launch(launch, "gfx942").metadata.waves_per_eu == 3
