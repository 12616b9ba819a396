"""Launch the kernels of causal attention: choose tiles, make TMA descriptors, order the heads."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.device import arch, sm_count
from ..core.dropout import threshold_of
from ..core.launch import launch_kernel
from ..core.layout import descriptor, strides_bth
from ..core.partial_sums import sum_partials
from ..core.triton import cdiv
from ._documents import clear_padding, schedule
from ._inputs import check_document_values
from ._kernels import (
    _causal_attention_bwd_dkdv_kernel,
    _causal_attention_bwd_dq_kernel,
    _causal_attention_fwd_kernel,
)
from ._one_pass import (
    _causal_attention_bwd_delta_kernel,
    _causal_attention_bwd_one_pass_kernel,
)
from ._reference import shapes_bwd, shapes_fwd, shapes_qkvpacked_bwd, split_qkv
from ._tile_choice import SHORT_KEYS, Tile, has_one_pass_tile, one_pass_fits, padded, plan
from .options import AttentionOptions

# Keys and values of the heads that run at the same time should stay in the L2 cache, which has
# 40 MB or more on data-center GPUs. 64 x 1,024 tokens on an H100 (November 2026): 4 MB take
# 1.36 ms, 16 MB 1.44.
L2_BYTES = 4 << 20
# The backward's passes over q, k, v and do: "two passes", "one pass" or "auto". "auto" is one pass
# if the kernel supports the arguments and `one_pass_fits`. On an H100 the backward takes 1.54 ms
# in one pass and 0.92 ms in two (64 x 1,024 tokens, 12 heads of 64; November 2026). With one
# program per multiprocessor, nothing runs while it waits for its additions in the L2 cache.
BACKWARD = "two passes"
# Queries per program of the kernel that computes delta.
DELTA_ROWS = 128


# --- tiles


def _plan(
    kernel: str,
    q: Tensor,
    k: Tensor,
    options: AttentionOptions,
    dbias: Tensor | None = None,
) -> Tile:
    has_dropout = options.dropout_p > 0
    applied = (
        options.cu_seqlens is not None,
        options.window < k.shape[1],
        options.softcap > 0,
        q.shape[2] != k.shape[2],
        has_dropout,
    )
    # The gradient of a bias alone takes no registers in the loop.
    num_options = sum(applied)
    if num_options and dbias is not None:
        num_options += 1
    return plan(
        kernel,
        q.shape[-1],
        q.dtype,
        arch(q.device),
        has_dropout=has_dropout,
        options=num_options,
        is_short=k.shape[1] <= SHORT_KEYS,
    )


def _makes_one_pass(q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether the backward makes one pass, by BACKWARD and the arguments.

    Raises: ValueError if BACKWARD is "one pass" and the kernel does not support the arguments.
    """
    if BACKWARD == "two passes":
        return False
    name = arch(q.device)
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    is_supported = (
        (T, H) == (S, G)
        and options.window >= S
        and options.cu_seqlens is None
        and (options.softcap, options.dropout_p) == (0, 0)
        and has_one_pass_tile(K, q.dtype, name)
    )
    if BACKWARD == "auto":
        # float32 matmuls take so long that a second pass over memory does not matter.
        is_16_bit = q.dtype != torch.float32
        return is_supported and is_16_bit and one_pass_fits(B * H, T, K, sm_count(q.device))
    if not is_supported:
        documents = "no documents" if options.cu_seqlens is None else "documents"
        raise ValueError(
            "causal_attention: expected as many queries as keys, as many query heads as key "
            "heads, a head size up to 64, sm_90 and no documents, window, softcap or dropout for "
            f"a backward in one pass, got q {tuple(q.shape)}, k {tuple(k.shape)}, {name}, "
            f"{documents}, window {options.window}, softcap {options.softcap} and dropout_p "
            f'{options.dropout_p}; set BACKWARD to "auto" or "two passes"'
        )
    return True


# --- launchers: each has the signature of its reference


def launch_fwd(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_fwd`."""
    check_document_values("causal_attention_varlen", options.cu_seqlens, q.shape[1])
    return launch_attend(q, k, v, options)


def launch_attend(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `attend`."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    group = H // G
    o, lse = shapes_fwd(q, k, v, options)
    clear_padding(options.cu_seqlens, o)
    clear_padding(options.cu_seqlens, lse, axis=2)
    tile = _plan("fwd", q, k, options)
    work, tiles = schedule(options.cu_seqlens, T, tile.block_m)
    kv_bytes = 2 * S * K * k.element_size()
    launch_kernel(_causal_attention_fwd_kernel, (tiles * B * H,),
        q_ptr=q, **_streamed(tile.block_n, k=k, v=v),
        work_ptr=work, cu_seqlens_ptr=options.cu_seqlens, seed_ptr=options.seed,
        o_ptr=o, lse_ptr=lse, **strides_bth(q=q, k=k, v=v),
        T=T, S=S, H=H, group=group,
        tiles=tiles, heads=B * H, heads_at_once=_heads_at_once(kv_bytes) * group,
        **_option_arguments(options, S), **tile.arguments(K),
    )  # fmt: skip
    return o, lse


def launch_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel counterpart of `reference_bwd`."""
    grads = shapes_bwd(do, dlse, q, k, v, o, lse, options)
    for grad in grads:
        clear_padding(options.cu_seqlens, grad)
    launch_grads = _grads_launcher(q, k, options)
    launch_grads(grads, None, do, dlse, q, k, v, o, lse, options)
    return grads


def launch_qkvpacked_fwd(
    qkv: Tensor,
    added_bias: Tensor | None,
    n_head: int,
    n_kv_head: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_qkvpacked_fwd`."""
    check_document_values("causal_attention_qkvpacked", options.cu_seqlens, qkv.shape[1])
    o, lse = launch_attend(*split_qkv(qkv, n_head, n_kv_head), options)
    B, T, H, K = o.shape
    return o.view(B, T, H * K), lse


def launch_qkvpacked_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    n_head: int,
    n_kv_head: int,
    needs_bias: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Kernel counterpart of `reference_qkvpacked_bwd`."""
    dqkv, dbias = shapes_qkvpacked_bwd(do, qkv, o, lse, n_head, n_kv_head, needs_bias, options)
    heads = split_qkv(qkv, n_head, n_kv_head)
    launch_packed_grads(dqkv, dbias if needs_bias else None, do, heads, o, lse, options)
    return dqkv, dbias


def launch_packed_grads(
    dqkv: Tensor,
    dbias: Tensor | None,
    do: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> None:
    """Write the gradients of `heads`, which are q, k and v, to dqkv, and their sums to `dbias`."""
    q, k, v = heads
    clear_padding(options.cu_seqlens, dqkv)
    grads = split_qkv(dqkv, q.shape[2], k.shape[2])
    do, o = do.view(q.shape), o.view(q.shape)
    launch_grads = _grads_launcher(q, k, options)
    launch_grads(grads, dbias, do, None, q, k, v, o, lse, options)


def _grads_launcher(q: Tensor, k: Tensor, options: AttentionOptions) -> Callable[..., None]:
    """Return the function that launches the backward in one pass or in two.

    It writes dq, dk and dv to `grads`, and their sums over tokens to `dbias` ((H + 2 G) K,). In
    each gradient the heads of a token are adjacent in memory. dk and dv have the same strides.
    """
    one_pass = _makes_one_pass(q, k, options)
    return _launch_one_pass if one_pass else _launch_two_passes


def _launch_two_passes(
    grads: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> None:
    """Launch the kernel that writes dq, then the kernel that writes dk and dv. See _kernels.py."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    group = H // G
    dq, dk, dv = grads
    delta = torch.empty_like(lse)
    kv_bytes = 2 * S * K * k.element_size()
    q_bytes = 2 * T * K * q.element_size() * group
    common = {
        "cu_seqlens_ptr": options.cu_seqlens,
        "seed_ptr": options.seed,
        **strides_bth(do=do, q=q, k=k, v=v),
        **{"T": T, "S": S, "H": H, "group": group},
        **_option_arguments(options, S),
    }

    # Programs that own queries: dq, and delta for the second kernel.
    tile = _plan("dq", q, k, options, dbias)
    work, tiles = schedule(options.cu_seqlens, T, tile.block_m)
    dq_sums = None if dbias is None else dbias.new_empty((B * tiles, H * K))
    launch_kernel(_causal_attention_bwd_dq_kernel, (tiles * B * H,),
        do_ptr=do, dlse_ptr=dlse, q_ptr=q, **_streamed(tile.block_n, k=k, v=v),
        o_ptr=o, lse_ptr=lse, work_ptr=work, delta_ptr=delta, dq_ptr=dq,
        dq_sums_ptr=dq_sums,
        stride_dqb=dq.stride(0), stride_dqt=dq.stride(1),
        tiles=tiles, heads=B * H, heads_at_once=_heads_at_once(kv_bytes) * group,
        **common, **tile.arguments(K),
    )  # fmt: skip

    # Programs that own keys: dk and dv. Tiles of the same length have the same list.
    listed_length = tile.block_m
    tile = _plan("dkdv", q, k, options, dbias)
    if options.cu_seqlens is None or tile.block_n != listed_length:
        work, tiles = schedule(options.cu_seqlens, S, tile.block_n)
    dkv_sums = None if dbias is None else dbias.new_empty((B * tiles, 2 * G * K))
    launch_kernel(_causal_attention_bwd_dkdv_kernel, (tiles * B * G,),
        **_streamed(tile.block_m, do=do, q=q), k_ptr=k, v_ptr=v,
        lse=_streamed_statistics(lse, q, options, tile.block_m),
        delta=_streamed_statistics(delta, q, options, tile.block_m),
        work_ptr=work, dk_ptr=dk, dv_ptr=dv, dkv_sums_ptr=dkv_sums,
        stride_dkb=dk.stride(0), stride_dkt=dk.stride(1),
        tiles=tiles, heads=B * G, heads_at_once=_heads_at_once(q_bytes),
        **common, **tile.arguments(K),
    )  # fmt: skip
    _sum_partials(dbias, dq_sums, dkv_sums)


def _launch_one_pass(
    grads: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> None:
    """Launch the kernel that writes delta, then the kernel that writes all else, _one_pass.py."""
    B, T, H, K = q.shape
    dq, dk, dv = grads

    # delta.
    delta = torch.empty_like(lse)
    strides = strides_bth(do=do)
    tiles = cdiv(T, DELTA_ROWS)
    launch_kernel(_causal_attention_bwd_delta_kernel, (tiles * B * H,),
        do_ptr=do, dlse_ptr=dlse, o_ptr=o, delta_ptr=delta, **strides, T=T, H=H, tiles=tiles,
        HEAD=K, BLOCK_M=DELTA_ROWS, BLOCK_K=padded(K), num_warps=4,
    )  # fmt: skip

    # dq, dk and dv. Each program has a float32 buffer for dq of one head.
    tile = _plan("one_pass", q, k, options, dbias)
    rows, columns = tile.block_m, tile.block_n
    programs = min(B * H, sm_count(q.device))
    sums = lse.new_empty((programs, cdiv(T, rows) * rows, padded(K)))
    dq_sums = None if dbias is None else dbias.new_empty((B * cdiv(T, rows), H * K))
    dkv_sums = None if dbias is None else dbias.new_empty((B * cdiv(T, columns), 2 * H * K))
    launch_kernel(_causal_attention_bwd_one_pass_kernel, (programs,),
        **_streamed(rows, do=do, q=q), **_streamed(columns, k=k, v=v),
        lse=_streamed_statistics(lse, q, options, rows),
        delta=_streamed_statistics(delta, q, options, rows),
        sums_ptr=sums, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, dq_sums_ptr=dq_sums, dkv_sums_ptr=dkv_sums,
        **strides, **strides_bth(q=q, k=k, v=v),
        stride_dqb=dq.stride(0), stride_dqt=dq.stride(1),
        stride_dkb=dk.stride(0), stride_dkt=dk.stride(1),
        T=T, H=H, heads=B * H, scale=options.scale, **tile.arguments(K),
    )  # fmt: skip
    _sum_partials(dbias, dq_sums, dkv_sums)


def _sum_partials(dbias: Tensor | None, dq_sums: Tensor | None, dkv_sums: Tensor | None) -> None:
    """Write the sums of the rows of `dq_sums`, then those of `dkv_sums`, to `dbias`."""
    if dbias is None:
        return
    dq_bias, dkv_bias = dbias.split_with_sizes((dq_sums.shape[1], dkv_sums.shape[1]))
    sum_partials(dq_sums, dq_bias, dkv_sums, dkv_bias)


# --- arguments of the kernels


def _heads_at_once(bytes_per_head: int) -> int:
    return max(1, L2_BYTES // max(1, bytes_per_head))


def _streamed(rows: int, **tensors: Tensor) -> dict:
    """Return (B, T, H, K) tensors as descriptors of `rows` tokens of one head, where possible.

    float32 stays a pointer: its matmuls take operands from registers, and operands that come
    through a descriptor take twice as many registers.
    """
    return {
        name: x if x.dtype == torch.float32 else descriptor(x, (1, rows, 1, padded(x.shape[-1])))
        for name, x in tensors.items()
    }


def _streamed_statistics(x: Tensor, q: Tensor, options: AttentionOptions, rows: int):
    """Return lse or delta (B, H, T) as a descriptor of `rows` numbers, if possible.

    Triton's descriptors load blocks that begin at multiples of 16 bytes. Documents begin anywhere.
    """
    if options.cu_seqlens is not None or q.dtype == torch.float32:
        return x
    B, H, T = x.shape
    return descriptor(x.view(B * H, T), (1, rows))


def _option_arguments(options: AttentionOptions, S: int) -> dict:
    """Options as kernel arguments. None compiles the kernel without the option."""
    has_dropout = options.dropout_p > 0
    return {
        "scale": options.scale,
        "window": options.window if options.window < S else None,
        "softcap": options.softcap if options.softcap > 0 else None,
        "threshold": threshold_of(options.dropout_p) if has_dropout else None,
        "keep": 1 - options.dropout_p if has_dropout else None,
    }
