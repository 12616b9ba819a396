"""The backward in one pass: its gradients, its order of additions, and when it is chosen."""

import re

import pytest
import torch

from tests.kernels.attention.cases import (
    DTYPES,
    assert_bitwise_equal,
    assert_matches_definition,
    attend_lse,
    make_inputs,
    meta,
    packed,
    run,
    sdpa,
)
from tritium.bench.codegen.disassembly import disassembly, resources
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import matrix_instructions
from tritium.bench.codegen.table import is_serialized
from tritium.kernels import causal_attention_qkvpacked
from tritium.kernels.attention import launch as attention_launch
from tritium.kernels.attention._tile_choice import one_pass_fits, plan
from tritium.kernels.attention.launch import launch_bwd, launch_qkvpacked_bwd
from tritium.kernels.attention.options import AttentionOptions
from tritium.kernels.core.op import INTERPRET

ONE_PASS = "_causal_attention_bwd_one_pass_kernel"
has_tiles = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_one_pass = pytest.mark.skipif(
    not (INTERPRET or has_tiles), reason="runs the kernel: needs sm_90 or TRITON_INTERPRET=1"
)


@pytest.fixture
def one_pass(monkeypatch):
    monkeypatch.setattr(attention_launch, "BACKWARD", "one pass")


# --- gradients


@needs_one_pass
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(
            ((B, T, T, H, H, K), dtype)
            for B, T, H, K in [(1, 1, 1, 16), (2, 17, 3, 40), (1, 127, 1, 59), (1, 129, 2, 64)]
            for dtype in DTYPES
        ),
        # Several tiles of keys, and a tail of each kind.
        *(((1, T, T, 1, 1, 64), torch.bfloat16) for T in (256, 300, 449)),
    ],
)
def test_accuracy_compared_with_sdpa(shape, dtype, device, one_pass):
    q, k, v, *incoming = make_inputs(*shape, dtype, device)
    got = run(attend_lse(), (q, k, v), incoming)
    assert_matches_definition(got, (q, k, v), incoming, baseline=sdpa)


@needs_one_pass
@pytest.mark.parametrize("programs", [1, 2])
def test_number_of_programs_does_not_change_the_result(programs, device, monkeypatch, one_pass):
    """Three heads: with two programs one of them has two heads."""
    q, k, v, *incoming = make_inputs(1, 140, 140, 3, 3, 16, torch.bfloat16, device)
    expected = run(attend_lse(), (q, k, v), incoming)
    monkeypatch.setattr(attention_launch, "sm_count", lambda _: programs)
    assert_bitwise_equal(run(attend_lse(), (q, k, v), incoming), expected)


@needs_one_pass
def test_each_program_adds_to_its_own_part_of_the_sums(device, monkeypatch, one_pass):
    """Memory that no program writes stays NaN."""
    seen, launch = [], attention_launch.launch_kernel

    def record(kernel, grid, **arguments):
        if kernel is attention_launch._causal_attention_bwd_one_pass_kernel:
            seen.append(arguments["sums_ptr"])
        launch(kernel, grid, **arguments)

    monkeypatch.setattr(attention_launch, "launch_kernel", record)
    q, k, v, *incoming = make_inputs(1, 140, 140, 3, 3, 16, torch.bfloat16, device)
    run(attend_lse(), (q, k, v), incoming)
    (sums,) = seen
    assert len(sums) == 3
    # The first column of 128 keys adds to the queries after them.
    assert not sums[:, 128:140].isnan().any()
    assert len(sums[:, 128:140].unique(dim=0)) == 3


@needs_one_pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_give_the_same_bits(dtype, device, one_pass):
    """1,000 reruns on a GPU, at a shape for which "auto" would choose one pass."""
    is_gpu = device.type == "cuda"
    B, T, H = (16, 1000, 16) if is_gpu else (1, 70, 2)
    q, k, v, *incoming = make_inputs(B, T, T, H, H, 64, dtype, device)
    first = run(attend_lse(), (q, k, v), incoming)
    for _ in range(1000 if is_gpu else 2):
        assert_bitwise_equal(run(attend_lse(), (q, k, v), incoming), first)


@needs_one_pass
def test_descriptors_and_pointers_give_the_same_result(device, one_pass):
    """Rows of qkv are aligned for TMA, or they are one element too long for that."""
    B, T, H, K = 2, 140, 2, 16
    q, k, v, do, _ = make_inputs(B, T, T, H, H, K, torch.float16, device)
    aligned = packed(q, k, v)
    odd = torch.cat([aligned, aligned[..., :1]], -1)[..., :-1]
    results = [
        run(lambda x: (causal_attention_qkvpacked(x, H),), [x], [do.flatten(2)])
        for x in (aligned, odd)
    ]
    assert_bitwise_equal(*results)


@needs_one_pass
@pytest.mark.parametrize("T", [0, 1, 140])
def test_gradient_of_the_bias_matches_two_passes(T, device, monkeypatch):
    """They differ by the order of float32 additions, and dqkv is rounded to bfloat16 after that."""
    q, k, v, do, _ = make_inputs(2, T, T, 2, 2, 16, torch.bfloat16, device)
    bias = torch.ones(96, device=device)

    def attend(x, bias):
        return (causal_attention_qkvpacked(x, 2, added_bias=bias),)

    arguments = attend, (packed(q, k, v), bias), [do.flatten(2)]
    _, dqkv, dbias = run(*arguments)
    monkeypatch.setattr(attention_launch, "BACKWARD", "one pass")
    _, dqkv_one, dbias_one = run(*arguments)
    torch.testing.assert_close(dqkv_one, dqkv, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dbias_one, dbias, rtol=1e-5, atol=1e-4)


# --- when it is chosen


@pytest.mark.plain
@pytest.mark.parametrize(
    ("heads", "tokens", "head_size", "fits"),
    [
        (32 * 12, 1024, 64, True),  # 2.9 waves
        (32 * 12, 2048, 64, False),  # exceeds the L2 cache
        (2 * 132, 1024, 64, True),
        (132, 1024, 64, False),  # one wave
        (2 * 132 + 1, 1024, 64, False),  # the third wave is empty
        (32 * 12, 512, 128, True),
        (32 * 12, 1024, 128, False),
    ],
)
def test_one_pass_fits_if_it_fills_the_device_and_its_data_the_cache(
    heads, tokens, head_size, fits
):
    assert one_pass_fits(heads, tokens, head_size, 132) == fits


def kernels_of(q, k, *, cu_seqlens=None, arch="sm_90", **options):
    """The backward's launches by name of the kernel."""
    (B, T, H, _), S = q.shape, k.shape[1]
    lse = meta(B, H, T, dtype=torch.float32)
    options = AttentionOptions(scale=0.1, cu_seqlens=cu_seqlens, **{"window": S, **options})
    with record_launches(arch) as launches:
        launch_bwd(q, None, q, k, k, q, lse, options)
    return {launch.kernel.__name__: launch for launch in launches}


LARGE = (32, 1024, 12, 64)
UNSUPPORTED = {
    "grouped heads": {"k": meta(32, 1024, 4, 64)},
    "more keys": {"k": meta(32, 1025, 12, 64)},
    "head size": {"q": meta(32, 1024, 12, 65), "k": meta(32, 1024, 12, 65)},
    "window": {"window": 1023},
    "softcap": {"softcap": 30.0},
    "dropout": {"dropout_p": 0.1, "seed": meta(dtype=torch.int64)},
    "documents": {
        "q": meta(1, 32768, 12, 64),
        "k": meta(1, 32768, 12, 64),
        "cu_seqlens": meta(33, dtype=torch.int32),
    },
    "architecture": {"arch": "sm_100"},
}


@pytest.mark.plain
def test_two_passes_are_the_default():
    assert ONE_PASS not in kernels_of(meta(*LARGE), meta(*LARGE))


@pytest.mark.plain
def test_auto_makes_one_pass_where_it_fits(monkeypatch):
    monkeypatch.setattr(attention_launch, "BACKWARD", "auto")
    found = kernels_of(meta(*LARGE), meta(*LARGE))
    assert set(found) == {"_causal_attention_bwd_delta_kernel", ONE_PASS}
    assert found[ONE_PASS].grid == (132,)
    # The buffer of sums does not grow with the batch.
    assert found[ONE_PASS].arguments["sums_ptr"].shape == (132, 1024, 64)
    for small in (meta(4, 1024, 12, 64), meta(*LARGE, dtype=torch.float32)):
        assert ONE_PASS not in kernels_of(small, small)


@pytest.mark.plain
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_one_pass_raises_and_auto_makes_two_passes_where_it_does_not_apply(name, monkeypatch):
    arguments = {"q": meta(*LARGE), "k": meta(*LARGE), **UNSUPPORTED[name]}
    monkeypatch.setattr(attention_launch, "BACKWARD", "auto")
    assert ONE_PASS not in kernels_of(**arguments)
    monkeypatch.setattr(attention_launch, "BACKWARD", "one pass")
    documents = "documents" if name == "documents" else "no documents"
    message = (
        rf'^causal_attention: expected as many .*, got q \(.*, {documents}, window .*"auto" or'
    )
    with pytest.raises(ValueError, match=message):
        kernels_of(**arguments)


# --- ahead-of-time compilation


def compiled_kernel(needs_bias):
    """The kernel for GPT-2's shape."""
    B, T, H, K = LARGE
    qkv, o, lse = meta(B, T, 3 * H * K), meta(B, T, H * K), meta(B, H, T, dtype=torch.float32)
    options = AttentionOptions(scale=0.125, window=T)
    with record_launches("sm_90") as launches:
        launch_qkvpacked_bwd(o, qkv, o, lse, H, H, needs_bias, options)
    (launch,) = (launch for launch in launches if launch.kernel.__name__ == ONE_PASS)
    return compile_launch(launch, "sm_90")


@pytest.mark.codegen
@pytest.mark.parametrize("needs_bias", [False, True])
def test_registers_do_not_spill_and_matmuls_do_not_wait(needs_bias, one_pass):
    compiled = compiled_kernel(needs_bias)
    text = disassembly(compiled)
    assert resources(compiled).spilled_bytes == 0
    assert "HGMMA" in matrix_instructions(text)
    assert not is_serialized(compiled, text)


@pytest.mark.codegen
def test_additions_to_dq_have_one_layout_and_a_barrier_after_each_column(one_pass):
    """The argument of _one_pass.py for a fixed order needs the barrier."""
    tile = plan("one_pass", 64, torch.bfloat16, "sm_90")
    numbers = tile.block_m * 64
    code = compiled_kernel(False).asm["ttgir"].splitlines()
    accesses = [
        line
        for line in code
        if re.search(rf"tt\.(load|store|atomic_rmw) .*tensor<{numbers}x!tt\.ptr<f32>", line)
    ]
    operations = [re.search(r"tt\.\w+(?: fadd, \w+)?", line).group() for line in accesses]
    assert operations == ["tt.load", "tt.store", "tt.atomic_rmw fadd, relaxed"]
    assert "cacheModifier = cg" in accesses[0]  # additions leave the L1 cache as it was
    assert len({re.search(r"!tt\.ptr<f32>, (#\w+)>", line).group(1) for line in accesses}) == 1
    assert any(
        "barrier all" in line or "gpu.barrier" in line for line in code[code.index(accesses[-1]) :]
    )
    # The hardware adds: no loop of compare-and-swap, and no fence between additions.
    text = disassembly(compiled_kernel(False))
    assert len(re.findall(r"\bREDG?\.E\.ADD\.F32x4", text)) == numbers // (4 * 32 * tile.num_warps)
    assert not re.search(r"\bATOMG?\.", text)
