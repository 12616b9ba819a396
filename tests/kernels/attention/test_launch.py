"""Launches of causal attention: tiles, descriptors, order of heads, lists of tiles."""

import itertools

import pytest
import torch

from tests.kernels.attention.cases import (
    LENGTHS,
    assert_bitwise_equal,
    attend_lse,
    make_inputs,
    meta,
    needs_kernels,
    packed,
    run,
)
from tritium.bench.codegen.disassembly import disassembly, resources
from tritium.bench.codegen.launches import compile_launch, record_launches
from tritium.bench.codegen.machine_code import is_serialized, matrix_instructions
from tritium.kernels import causal_attention_qkvpacked
from tritium.kernels.attention import _documents
from tritium.kernels.attention import launch as attention_launch
from tritium.kernels.attention._documents import clear_padding, schedule
from tritium.kernels.attention._tile_choice import (
    FLOAT32_TILES,
    OPTION_TILES,
    SHORT_KEYS,
    SHORT_TILES,
    TILES,
    padded,
    plan,
)
from tritium.kernels.attention.launch import launch_bwd, launch_fwd
from tritium.kernels.attention.options import AttentionOptions
from tritium.kernels.core.triton import cdiv

# --- tiles


@pytest.mark.plain
@pytest.mark.parametrize("rows", [*TILES.values(), FLOAT32_TILES], ids=[*TILES, "float32"])
def test_every_kernel_has_tiles_up_to_head_size_256(rows):
    for kernel in ("fwd", "dq", "dkdv"):
        assert max(rows[kernel]) == 256
        for tile in rows[kernel].values():
            owned, looped = tile.block_m, tile.block_n
            if kernel == "dkdv":
                owned, looped = looped, owned
            assert owned >= 16
            assert looped >= 16
            assert tile.block_n % 4 == 0, "dropout draws words for four keys at a time"


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sm_80", "sm_"),
        ("sm_89", "sm_"),
        ("sm_90", "sm_9"),
        ("sm_103", "sm_10"),
        ("sm_120", "sm_12"),
        ("gfx950", "gfx"),
    ],
)
def test_tiles_are_chosen_by_architecture_head_size_and_dtype(arch, family):
    assert plan("dq", 40, torch.bfloat16, arch) is TILES[family]["dq"][64]
    assert plan("dkdv", 65, torch.float16, arch) is TILES[family]["dkdv"][128]
    assert plan("fwd", 65, torch.float32, arch) is FLOAT32_TILES["fwd"][128]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("kernel", "owned", "looped"),
    [("fwd", "block_m", "block_n"), ("dkdv", "block_n", "block_m")],
)
@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(64, torch.bfloat16), pytest.param(256, torch.float32, id="smallest_tile")],
)
def test_dropout_halves_the_side_that_is_looped_over(head_size, dtype, kernel, owned, looped):
    tile = plan(kernel, head_size, dtype, "sm_90")
    with_dropout = plan(kernel, head_size, dtype, "sm_90", has_dropout=True)
    assert getattr(with_dropout, owned) == getattr(tile, owned)
    assert getattr(with_dropout, looped) == max(16, getattr(tile, looped) // 2)


@pytest.mark.plain
def test_short_sequences_without_options_have_their_own_forward_tile():
    sizes = ("fwd", 64, torch.bfloat16, "sm_90")
    long = TILES["sm_9"]["fwd"][64]
    assert plan(*sizes) is long
    assert plan(*sizes, is_short=True) is SHORT_TILES["sm_9"]["fwd", 64] != long
    assert plan(*sizes, is_short=True, options=1) is long
    assert plan("dq", *sizes[1:], is_short=True) is TILES["sm_9"]["dq"][64]
    assert plan("fwd", 64, torch.float32, "sm_90", is_short=True) is FLOAT32_TILES["fwd"][64]


@pytest.mark.plain
def test_number_of_keys_chooses_the_forward_tile():
    chosen = []
    for T in (SHORT_KEYS, SHORT_KEYS + 1):
        q = meta(1, T, 1, 64)
        with record_launches("sm_90") as launches:
            launch_fwd(q, q, q, AttentionOptions(scale=0.1, window=T))
        chosen.append(launches[0].arguments["BLOCK_N"])
    rows = SHORT_TILES["sm_9"]["fwd", 64], TILES["sm_9"]["fwd"][64]
    assert chosen == [tile.block_n for tile in rows]


@pytest.mark.plain
@pytest.mark.parametrize(
    "option", [{"cu_seqlens": meta(3, dtype=torch.int32)}, {"window": 63}, {"softcap": 30.0}]
)
def test_each_option_counts_when_a_tile_is_chosen(option):
    """The tile for few keys is for attention without options."""
    q = meta(1, 64, 1, 64)
    with record_launches("sm_90") as launches:
        launch_fwd(q, q, q, AttentionOptions(**{"scale": 0.1, "window": 64} | option))
    forward = launches[-1].arguments
    assert SHORT_TILES["sm_9"]["fwd", 64].block_n != TILES["sm_9"]["fwd"][64].block_n
    assert forward["BLOCK_N"] == TILES["sm_9"]["fwd"][64].block_n


@pytest.mark.plain
def test_options_choose_narrower_tiles_at_head_size_128():
    one, more = OPTION_TILES["sm_9"]["dkdv", 128]
    sizes = (128, torch.bfloat16, "sm_90")
    assert [plan("dkdv", *sizes, options=n) for n in (1, 2, 5)] == [one, more, more]
    assert plan("dkdv", 128, torch.float32, "sm_90", options=1) is FLOAT32_TILES["dkdv"][128]
    assert plan("dkdv", 128, torch.bfloat16, "sm_80", options=1) is TILES["sm_"]["dkdv"][128]


@pytest.mark.plain
@pytest.mark.parametrize(
    ("head_size", "columns"),
    [(1, 16), (16, 16), (40, 64), (64, 64), (65, 128), (111, 128), (256, 256)],
)
def test_head_size_is_padded_to_a_power_of_two(head_size, columns):
    assert padded(head_size) == columns


# --- descriptors and the order of heads


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descriptors_and_pointers_give_the_same_result(dtype, device, monkeypatch):
    """qkv is aligned for TMA, or has rows that are one element too long, or has an odd address."""
    B, T, H, K = 2, 140, 2, 16
    q, k, v, do, _ = make_inputs(B, T, T, H, H, K, dtype, device)
    aligned = packed(q, k, v)
    odd = torch.cat([aligned, aligned[..., :1]], -1)[..., :-1]
    shifted = torch.cat([aligned.flatten()[:1], aligned.flatten()])[1:].view_as(aligned)
    seen, original = [], attention_launch.descriptor

    def descriptor(x, block):
        seen.append(original(x, block))
        return seen[-1]

    monkeypatch.setattr(attention_launch, "descriptor", descriptor)
    results = [
        run(lambda x: (causal_attention_qkvpacked(x, H),), [x], [do.flatten(2)])
        for x in (aligned, odd, shifted)
    ]
    if device.type == "cpu" or torch.cuda.get_device_capability()[0] >= 9:
        # Per run: k and v of the forward; k and v for dq; do, q, lse and delta for dk and dv. The
        # backward makes do contiguous, so it has a descriptor whatever the layout of qkv.
        unaligned_run = [True, True, True, True, False, True, False, False]
        is_pointer = [isinstance(x, torch.Tensor) for x in seen]
        assert is_pointer == [False] * 8 + unaligned_run + unaligned_run
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


@needs_kernels
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_order_of_heads_does_not_change_the_result(heads, device, monkeypatch):
    """Five heads in groups of 1, 2 and 4: the last group may be smaller."""
    q, k, v, *incoming = make_inputs(1, 140, 140, 5, 5, 16, torch.bfloat16, device)
    expected = run(attend_lse(), (q, k, v), incoming)
    monkeypatch.setattr(attention_launch, "L2_BYTES", heads * 2 * 140 * 16 * 2)
    assert_bitwise_equal(run(attend_lse(), (q, k, v), incoming), expected)


# --- the list of tiles of packed documents


@needs_kernels
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("lengths", [*LENGTHS, (0,) * 200 + (17, 400, 16, 15)])
def test_list_has_each_tile_once_and_the_most_work_first(lengths, block, device):
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    work, tiles = schedule(cu_seqlens, sum(lengths), block)
    assert work.shape == (tiles, 2)
    listed = [tuple(pair) for pair in work.tolist() if pair != [-1, -1]]
    expected = [
        (document, tile)
        for document, length in enumerate(lengths)
        for tile in range(cdiv(length, block))
    ]
    assert sorted(listed) == expected
    assert listed == sorted(listed, key=lambda pair: (-pair[1], pair[0]))


@needs_kernels
@pytest.mark.parametrize(
    "invalid", [[40, 90], [300, 200, 100], [0, 500, 300], [-50, 100], [0, 2**31 - 17] * 18]
)
def test_list_of_invalid_documents_stays_in_bounds(invalid, device):
    """Memory before and after cu_seqlens does not change the list: the kernel does not read it."""
    surrounded = [-(2**30)] * 8 + invalid + [2**30] * 8
    surrounded = torch.tensor(surrounded, dtype=torch.int32, device=device)
    work, _ = schedule(surrounded[8:-8], 100, 16)
    used = work[(work != -1).any(1)]
    assert (used >= 0).all()
    assert (used[:, 0] < len(invalid) - 1).all()
    alone, _ = schedule(torch.tensor(invalid, dtype=torch.int32, device=device), 100, 16)
    assert torch.equal(work, alone)


@needs_kernels
@pytest.mark.parametrize("bounds", [(0, 5), (3, 5), (3, 3), (0, 0), (5, 9), (-4, 2)])
def test_tokens_outside_of_all_documents_become_zero(bounds, device, monkeypatch):
    """Also with more blocks of padding than programs, and with documents past the last token."""
    monkeypatch.setattr(_documents, "PADDING_BLOCK", 4)
    monkeypatch.setattr(_documents, "PADDING_PROGRAMS", 2)
    cu_seqlens = torch.tensor([bounds[0], 1, bounds[1]], dtype=torch.int32, device=device)
    token = torch.arange(5, device=device)
    is_padding = (token < bounds[0]) | (token >= bounds[1])
    for shape, axis in (((3, 5, 2, 3), 1), ((1, 2, 5), 2)):
        x = torch.ones(shape, device=device)
        clear_padding(cu_seqlens, x, axis)
        expected = (~is_padding).float().view([5 if i == axis else 1 for i in range(len(shape))])
        assert torch.equal(x, expected.expand(shape))


# --- ahead-of-time compilation


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("T", "S", "documents", "window", "dropout_p"),
    [
        (1, 1, 0, 1, 0.1),
        pytest.param(1, 300, 0, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 1, 1, 1, 0.0, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_one_compile(T, S, documents, window, dropout_p):
    """Triton makes an integer argument of 1 a constant, which lacks the methods of a tensor."""
    q, k, lse = meta(1, T, 1, 16), meta(1, S, 1, 16), meta(1, 1, T, dtype=torch.float32)
    cu_seqlens = meta(documents + 1, dtype=torch.int32) if documents else None
    seed = meta(dtype=torch.int64) if dropout_p else None
    options = AttentionOptions(
        scale=0.25, window=window, dropout_p=dropout_p, seed=seed, cu_seqlens=cu_seqlens
    )
    with record_launches("sm_90") as launches:
        launch_fwd(q, k, k, options)
        launch_bwd(q, lse, q, k, k, q, lse, options)
    names = {launch.kernel.__name__ for launch in launches}
    assert len(names) == (5 if documents else 3)
    for launch in launches:
        assert "cubin" in compile_launch(launch, "sm_90").asm, launch.kernel.__name__


@pytest.mark.codegen
@pytest.mark.parametrize(
    ("head_size", "heads", "has_documents", "option"),
    [
        pytest.param(64, 2, False, {"window": 512}, marks=pytest.mark.slow),
        (64, 2, True, {"softcap": 30.0, "window": 512}),
        pytest.param(128, 2, False, {"softcap": 30.0}, marks=pytest.mark.slow),
        pytest.param(128, 1, True, {}, marks=pytest.mark.slow),  # grouped heads
        (128, 2, False, {"dropout_p": 0.1}),
    ],
    ids=lambda value: f"sm_90-{value}" if isinstance(value, int) else None,
)
def test_options_neither_spill_nor_serialize_matrix_instructions(
    head_size, heads, has_documents, option
):
    """The golden table has the kernels without options."""
    q, k = meta(1, 4096, 2, head_size), meta(1, 4096, heads, head_size)
    lse = meta(1, 2, 4096, dtype=torch.float32)
    cu_seqlens = meta(9, dtype=torch.int32) if has_documents else None
    seed = meta(dtype=torch.int64) if "dropout_p" in option else None
    options = AttentionOptions(
        scale=0.1, seed=seed, cu_seqlens=cu_seqlens, **{"window": 4096, **option}
    )
    with record_launches("sm_90") as launches:
        launch_fwd(q, k, k, options)
        launch_bwd(q, lse, q, k, k, q, lse, options)
    kernels = {
        launch.kernel.__name__: compile_launch(launch, "sm_90")
        for launch in launches
        if "HEAD" in launch.arguments
    }
    assert len(kernels) == 3
    for name, compiled in kernels.items():
        assert resources(compiled).spilled_bytes == 0, name
        text = disassembly(compiled)
        assert "HGMMA" in matrix_instructions(text), name
        assert not is_serialized(text), name
