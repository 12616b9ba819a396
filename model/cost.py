"""The cost of a GPT, as formulas: parameters, FLOPs, bytes of activations and of a training step.

    parameters   V D embedding + V D head if it is untied + C D learned positions + D final norm,
                 and per block 2 D norms + D (D + 2 G K) qkv + D^2 projection + 2 D F MLP (SwiGLU:
                 3 D F) + 2 K norms of queries and keys (QK-norm).
                 A bias has as many elements as its layer has outputs. RMS norm and SwiGLU have none
    FLOPs        6 (parameters - lookups) + 12 L D S per token, forward and backward: 2 per
                 multiply-add; the backward costs twice the forward. Lookups are the parameters that
                 no matmul reads: C D positions, and V D of an embedding whose head is untied.
                 Attention counts S = T keys per query, although causal kernels compute half of
                 them. With a window of W < T it counts S = W (2 T - W) / T, which is in the same
                 way twice the mean number of visible keys per query. MFU uses it
    activations  activation_bytes: what autograd keeps between forward and backward
    step         step_bytes: all memory, at the moment of a step when it is largest, except for the
                 blocks of scores and random numbers that the reference of attention makes for a
                 window, softcap or dropout. The kernels make none
    generation   cache_bytes: keys and values of all tokens, 2 L B T G K elements

Symbols    V vocabulary, C context_tokens, L layers, D model width, F feed-forward width, H query
           heads, G key and value heads, K head size, B sequences, T tokens, N = B T
Source     Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for FLOPs and MFU
"""

from pathlib import Path

from ..errors import InputError
from ..kernels.loss.chunks import block_rows
from ..kernels.loss.linear_cross_entropy import cost
from .choices import MLPS, NORMS, POSITIONS, RECOMPUTATIONS
from .config import DROPOUTS, AdapterOptions, GPTConfig
from .lora import lora_layers, lora_parameters

# Two float32 moments per parameter.
ADAMW_STATE_BYTES = 8


def parameters(config: GPTConfig) -> int:
    """Return the number of parameters, without the padding rows of embedding and head."""
    D = config.d_model
    gains = config.n_layer * 2 * D + D
    biases = 0
    if config.bias:
        biases += gains if NORMS[config.norm].has_bias else 0
        mlp_outputs = config.d_feedforward + D if MLPS[config.mlp].has_bias else 0
        biases += config.n_layer * (D + mlp_outputs)
    if config.has_qkv_bias:
        biases += config.n_layer * (D + 2 * _kv_width(config))
    if config.qk_norm:
        gains += config.n_layer * 2 * config.head_size
    tables = (1 if config.tied_head else 2) * config.vocab_size * D + positions(config)
    return tables + matrices(config) + gains + biases + _prefix_elements(config)


def _prefix_elements(config: GPTConfig) -> int:
    return config.prefix_tokens * config.n_layer * 2 * _kv_width(config)


def adapter_elements(config: GPTConfig, adapter: AdapterOptions | None) -> int:
    """Return the number of trained elements if the model's own weights are frozen, else 0."""
    return lora_parameters(config, adapter) + _prefix_elements(config)


def check_size(path: Path, config: GPTConfig, *, bytes_per_parameter: float = 1 / 8) -> None:
    """Raise InputError if a file, or the files in a folder, are too small for the model.

    A damaged configuration can name sizes with which it would take hours to build the model. The
    default of one bit per parameter is less than in any file format.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    count = parameters(config)
    if size < count * bytes_per_parameter:
        raise InputError(
            f"{path}: expected weights of the {count:,} parameters in its configuration, got "
            f"{size:,} bytes; one of the two is damaged"
        )


def matrices(config: GPTConfig) -> int:
    """Return the number of elements of all weight matrices in the blocks."""
    D = config.d_model
    attention = D * (D + 2 * _kv_width(config)) + D * D
    mlp = MLPS[config.mlp].matrices * D * config.d_feedforward
    return config.n_layer * (attention + mlp)


def positions(config: GPTConfig) -> int:
    """Return the number of elements of the learned positions."""
    return config.position_rows * config.d_model if POSITIONS[config.position].has_table else 0


def _kv_width(config: GPTConfig) -> int:
    return config.kv_heads * config.head_size


def matmul_parameters(config: GPTConfig) -> int:
    """Return the number of parameters without those that are only looked up."""
    lookups = 0 if config.tied_head else config.vocab_size * config.d_model
    return parameters(config) - positions(config) - lookups


def attended_keys(config: GPTConfig, tokens: int) -> int:
    """Return W (2 T - W) / T: twice the mean number of keys per query, without the term W / T.

    T is `tokens`. W is the window, at most T; without a window it is T. Rounded down.
    """
    window = min(config.window or tokens, tokens)
    return window * (2 * tokens - window) // tokens


def flops_per_token(config: GPTConfig, tokens: int, adapter: AdapterOptions | None = None) -> int:
    """Return the FLOPs of forward and backward per token, in sequences of `tokens`.

    With LoRA, frozen weights cost 4 and not 6 per element: they have no gradient.
    """
    attention = 12 * config.n_layer * config.d_model * attended_keys(config, tokens)
    trained = adapter_elements(config, adapter)
    per_weight = 4 if trained else 6
    return per_weight * matmul_parameters(config) + 6 * trained + attention


def activation_bytes(
    config: GPTConfig, batch: int, tokens: int, itemsize: int, recompute: str = "none"
) -> int:
    """Return the bytes that autograd keeps between forward and backward, without the weights.

    The sequences are not packed: positions are the same in each.

    Args:
        batch, tokens: number of sequences, and their length.
        itemsize: bytes per element of the activations: 4, or 2 in 16 bits.
        recompute: mode of activation checkpointing.
    """
    D = config.d_model
    row = RECOMPUTATIONS[recompute]
    block = _block_bytes(config, itemsize) - _dropped_bytes(config, itemsize, recompute)
    # A block's inputs are the stream and a branch; the first block has no branch.
    inputs = (2 * config.n_layer - 1) * D * itemsize if row.keeps_inputs else 0
    final_norm = itemsize * D + 4 * NORMS[config.norm].statistics
    token_ids = 8
    # The reference of the embedding keeps its mask. The first block has no mask of a branch before
    # its first norm, but the final norm has one.
    masks = 4 * D if config.embedding_dropout else 0
    masks += _mask_bytes(config, itemsize) if row.keeps_inputs else 0
    per_token = config.n_layer * block + inputs + final_norm + token_ids + masks

    # RoPE keeps two float32 tables (T, K / 2). Learned positions keep their int64 indices.
    position = POSITIONS[config.position]
    per_position = 4 * config.head_size if position.rotates else 8 if position.has_table else 0
    divisor = 8  # the mean loss keeps the number of targets
    has_dropout = any(getattr(config, name) for name in DROPOUTS)
    seeds = 16 * (3 * config.n_layer + 1) if has_dropout else 0
    head = _head_bytes(config, batch * tokens, itemsize)
    return batch * tokens * per_token + tokens * per_position + divisor + seeds + head


def _block_bytes(config: GPTConfig, itemsize: int) -> int:
    """Return the bytes per token that a block keeps.

    5 D          inputs of qkv, projection and MLP, and the residual stream that each norm reads
    D + 2 G K    q, k and v
    D + G K      q and k after RoPE or QK-norm
    2 F          hidden tensors of the MLP
    masks        of two branches, with dropout, if the reference of the norm keeps them
    float32      statistics of two norms, and a log-sum-exp per query head
    """
    D = config.d_model
    KV = _kv_width(config)
    changes_qk = POSITIONS[config.position].rotates or config.qk_norm
    elements = 5 * D + D + 2 * KV + (D + KV if changes_qk else 0) + 2 * config.d_feedforward
    statistics = 2 * NORMS[config.norm].statistics + config.n_head
    return elements * itemsize + 2 * _mask_bytes(config, itemsize) + 4 * statistics


def _mask_bytes(config: GPTConfig, itemsize: int) -> int:
    """Return the bytes per token of a branch's mask, if the norm's reference keeps it."""
    keeps_mask = config.dropout and itemsize == 4 and NORMS[config.norm].keeps_float32_mask
    return 4 * config.d_model if keeps_mask else 0


def _dropped_bytes(config: GPTConfig, itemsize: int, recompute: str) -> int:
    """Return the bytes per token that a block computes again in its backward."""
    block = _block_bytes(config, itemsize)
    return RECOMPUTATIONS[recompute].dropped_bytes(config, itemsize, block)


def _head_bytes(config: GPTConfig, rows: int, itemsize: int) -> int:
    """Return the bytes of the head's gradients, which its forward computes."""
    return cost(rows, config.d_model, config.padded_vocab_size, itemsize)["saved_bytes"]


def cache_bytes(config: GPTConfig, batch: int, tokens: int, itemsize: int) -> int:
    """Return the bytes of all keys and values during generation: 2 L B T G K elements."""
    return 2 * config.n_layer * batch * tokens * _kv_width(config) * itemsize


def step_bytes(
    config: GPTConfig,
    batch: int,
    tokens: int,
    itemsize: int,
    *,
    accumulates: bool,
    recompute: str = "none",
    block_matrix_state_bytes: int = ADAMW_STATE_BYTES,
    adapter: AdapterOptions | None = None,
) -> dict[str, int]:
    """Return the bytes allocated at the fullest moment of a training step, by part.

    The fullest moment is one of four:

    1. the head, with logits or with its scaled gradients
    2. the backward of the last block, with the activations of all blocks
    3. the backward of the first block, with the gradients of all other blocks
    4. the end of the backward, with all gradients

    Between 2 and 3, each block frees its activations and allocates its gradients. Blocks are equal,
    so no moment in between is fuller than both.

    Args:
        batch, tokens: sequences per micro-batch, and their length.
        itemsize: bytes per element of activations: 4, or 2 if matmuls run in 16 bits. Then linear
            layers have 16-bit copies of their weights.
        accumulates: whether gradients exist before the forward, from earlier micro-batches or in
            the buckets of an all-reduce.
        recompute: mode of activation checkpointing.
        block_matrix_state_bytes: bytes of optimizer state per element of the blocks' matrices. All
            other parameters have the state of AdamW.
        adapter: LoRA. Then only its matrices have gradients and optimizer state.
    Returns: weights, copies, gradients, optimizer, activations, head, temporaries.
    """
    weights = _weight_bytes(config)
    trained = adapter_elements(config, adapter)
    if trained:
        of_prefix = ADAMW_STATE_BYTES * _prefix_elements(config)
        optimizer = block_matrix_state_bytes * lora_parameters(config, adapter) + of_prefix
    else:
        saved_state = (ADAMW_STATE_BYTES - block_matrix_state_bytes) * matrices(config)
        optimizer = 2 * weights - saved_state
    moments = _moments(config, batch, tokens, itemsize, accumulates, recompute, adapter)
    names = ("copies", "gradients", "activations", "head", "temporaries")
    parts = dict(zip(names, max(moments, key=sum), strict=True))
    return {
        "weights": weights + 4 * lora_parameters(config, adapter),
        "optimizer": optimizer,
        **parts,
    }


def _weight_bytes(config: GPTConfig) -> int:
    """Return the bytes of all float32 weights, with the padding rows of embedding and head."""
    tables = 1 if config.tied_head else 2
    padding = tables * (config.padded_vocab_size - config.vocab_size) * config.d_model
    return 4 * (parameters(config) + padding)


def _moments(
    config: GPTConfig,
    batch: int,
    tokens: int,
    itemsize: int,
    accumulates: bool,
    recompute: str,
    adapter: AdapterOptions | None,
) -> list[tuple[int, ...]]:
    """Return (copies, gradients, activations, head, temporaries) at the four moments of a step."""
    N = batch * tokens
    D = config.d_model
    weights = _weight_bytes(config)
    embedding = 4 * config.padded_vocab_size * D
    tables = embedding * (1 if config.tied_head else 2) + 4 * positions(config)
    kept_head = _head_bytes(config, N, itemsize)
    activations = activation_bytes(config, batch, tokens, itemsize, recompute) - kept_head
    in_layers = matrices(config) + lora_parameters(config, adapter)
    copies = itemsize * in_layers if itemsize < 4 else 0
    trained = adapter_elements(config, adapter)
    if trained:
        # Only the adapter has gradients. The head keeps the gradient of its input alone.
        weights = 4 * trained
        embedding = tables = 0
        kept_head = itemsize * N * D
        activations += N * _lora_bytes(config, itemsize, adapter or AdapterOptions())
    before = weights if accumulates else 0

    # 1. the head. Its forward also holds the output of the final norm and the last branch. Its
    # backward scales the gradients into new tensors.
    logits = _logits_bytes(config, N, itemsize) + 2 * itemsize * N * D
    scaled = itemsize * N * D + embedding
    head = (copies, before, activations, kept_head + max(logits, scaled), 0)

    # 2. the backward of the last block. The gradient of a tied head is added to the embedding's at
    # the end. That of an untied head is already added to earlier gradients, if there are any.
    is_tied = config.tied_head
    if not is_tied and accumulates:
        scaled -= embedding
    recomputed = N * _dropped_bytes(config, itemsize, recompute)
    mlp = MLPS[config.mlp].backward_bytes(
        N, D, config.d_feedforward, itemsize, RECOMPUTATIONS[recompute].in_mlp
    )
    last_block = (copies, before, activations, scaled, recomputed + mlp)

    # 3. the backward of the first block
    others = (config.n_layer - 1) / config.n_layer
    gradients = before or int(others * (weights - tables))
    first_block = (copies, gradients, int((1 - others) * activations), scaled, recomputed + mlp)

    # 4. the end. A tied embedding has two gradients: from the head, and from the lookup of tokens.
    # An untied one has the latter. Without accumulation, one of them is already counted in
    # `weights`. Temporaries: the float32 gradient of the embedding's output.
    extra_embeddings = (2 if accumulates else 1) - (0 if is_tied else 1)
    end = (copies, weights, 0, embedding * extra_embeddings, 4 * N * D)
    return [head, last_block, first_block, end]


def _lora_bytes(config: GPTConfig, itemsize: int, adapter: AdapterOptions) -> int:
    """Return the bytes per token that LoRA keeps for its backward: an upper bound.

    Each layer keeps its input times A, and with dropout its dropped input and a mask of 1 byte per
    element. The MLP of a layer with LoRA keeps its hidden tensors without fusion: SwiGLU has two
    more.
    """
    layers = lora_layers(config, adapter.lora_targets) if adapter.lora else {}
    total = len(layers) * adapter.lora * itemsize
    if adapter.lora_dropout:
        total += sum(n_in for _, n_in in layers.values()) * (itemsize + 1)
    if any(".mlp." in name for name in layers):
        extra = MLPS[config.mlp].extra_hidden_without_fusion
        total += extra * config.n_layer * config.d_feedforward * itemsize
    return total


def _logits_bytes(config: GPTConfig, N: int, itemsize: int) -> int:
    """Return the bytes of the head's logits, and of its weight in other dtypes.

    A chunk has logits, and a softmax that its gradient overwrites. With several chunks, the next
    logits are allocated before the softmax is freed. In 16 bits the weight is rounded to 16 bits.
    The reference then has float32 copies of the weight and of a chunk of x and dx. The kernels do
    not, but have larger chunks.
    """
    D = config.d_model
    V = config.vocab_size
    rows = block_rows(N, V)
    logits = 4 * rows * V * (2 if rows == N else 3)
    if itemsize == 4:
        return logits
    sizes = (N, D, config.padded_vocab_size, itemsize)
    workspace = cost(*sizes, weight_itemsize=4)["workspace_bytes"]
    return max(logits + 4 * D * V + 2 * 4 * rows * D, workspace)
