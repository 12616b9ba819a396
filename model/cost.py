"""The cost of a GPT, as formulas: parameters, FLOPs, bytes of activations and of a step.

    parameters   V D embedding + C D positions (learned only) + D final norm, and per block
                 2 D norms + D (D + 2 G K) qkv + D^2 projection + 2 D F MLP (SwiGLU 3 D F).
                 A bias has as many elements as its layer has outputs; RMS norm and SwiGLU have none
    FLOPs        6 (parameters - C D) + 12 L D T per token, forward and backward: 2 per
                 multiply-add, and the backward costs two forwards. Attention is counted in full,
                 although causal kernels compute half. MFU is reported with this number
    activations  activation_bytes: what autograd keeps between forward and backward
    step         step_bytes: everything allocated at the fullest moment of a step

Source     Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for FLOPs and MFU
"""

from ..kernels.loss.linear_cross_entropy import block_rows, cost
from .config import GPTConfig
from .layers import MLPS, NORMS, POSITIONS
from .recompute import RECOMPUTATIONS

_ADAMW_STATE_BYTES = 8


def parameters(config: GPTConfig) -> int:
    """Return the trainable elements, without the padding rows of the embedding."""
    D = config.d_model
    gains = config.n_layer * 2 * D + D
    biases = 0
    if config.bias:
        biases += gains if NORMS[config.norm].has_bias else 0
        mlp_outputs = config.d_feedforward + D if MLPS[config.mlp].has_bias else 0
        biases += config.n_layer * (D + 2 * _kv_width(config) + D + mlp_outputs)
    return config.vocab_size * D + positions(config) + matrices(config) + gains + biases


def matrices(config: GPTConfig) -> int:
    """Return the elements of the weight matrices of all blocks."""
    D = config.d_model
    attention = D * (D + 2 * _kv_width(config)) + D * D
    mlp = MLPS[config.mlp].matrices * D * config.d_feedforward
    return config.n_layer * (attention + mlp)


def positions(config: GPTConfig) -> int:
    """Return the elements of the learned positions."""
    return config.context_tokens * config.d_model if POSITIONS[config.position].has_table else 0


def _kv_width(config: GPTConfig) -> int:
    return config.kv_heads * config.head_size


def flops_per_token(config: GPTConfig, tokens: int) -> int:
    """Return the FLOPs of forward and backward per token, in sequences of `tokens`."""
    matmuls = 6 * (parameters(config) - positions(config))
    return matmuls + 12 * config.n_layer * config.d_model * tokens


def activation_bytes(
    config: GPTConfig, batch: int, tokens: int, itemsize: int, recompute: str = "none"
) -> int:
    """Return the bytes kept between forward and backward of the loss, without the weights.

    Args:
        batch, tokens: sequences, and their length.
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
    per_token = config.n_layer * block + inputs + final_norm + token_ids

    # RoPE keeps two tables of K / 2 float32 columns, an embedding the int64 positions.
    per_position = 4 * config.head_size if POSITIONS[config.position].rotates else 8
    divisor = 8  # of the mean loss
    head = _head_bytes(config, batch * tokens)
    return batch * tokens * per_token + tokens * per_position + divisor + head


def _block_bytes(config: GPTConfig, itemsize: int) -> int:
    """Bytes per token that a block keeps.

    5 D: the inputs of qkv, projection and MLP, and the residual stream that two norms read.
    D + 2 G K: q, k, v. RoPE: D + G K for rotated q and k. 2 F: the MLP's hidden tensors.
    Float32: the statistics of two norms, and a log-sum-exp per head.
    """
    D = config.d_model
    KV = _kv_width(config)
    rotated = D + KV if POSITIONS[config.position].rotates else 0
    elements = 5 * D + D + 2 * KV + rotated + 2 * config.d_feedforward
    return elements * itemsize + 4 * (2 * NORMS[config.norm].statistics + config.n_head)


def _dropped_bytes(config: GPTConfig, itemsize: int, recompute: str) -> int:
    """Bytes per token that a block does not keep, and computes again in its backward."""
    block = _block_bytes(config, itemsize)
    return RECOMPUTATIONS[recompute].dropped_bytes(config, itemsize, block)


def _head_bytes(config: GPTConfig, rows: int) -> int:
    """The float32 gradients of the head's input and weight, which its forward computes."""
    return cost(rows, config.d_model, config.vocab_size, 4)["saved_bytes"]


def step_bytes(
    config: GPTConfig,
    batch: int,
    tokens: int,
    itemsize: int,
    *,
    accumulates: bool,
    recompute: str = "none",
    block_matrix_state_bytes: int = _ADAMW_STATE_BYTES,
) -> dict[str, int]:
    """Return the bytes allocated at the fullest moment of a training step, by part.

    The fullest moment is one of four: the forward of the head, with its logits; the backward of the
    last block; the backward of the first block, with the gradients of all others; the end, with all
    gradients. In between, activations are freed and gradients allocated at an even pace.

    Args:
        batch, tokens: sequences per micro-batch, and their length.
        itemsize: 4; or 2 for matmuls in 16 bits, with copies of the weights of linear layers.
        accumulates: whether gradients exist before the forward: of earlier micro-batches, or in
            the buckets that reduce them.
        recompute: mode of activation checkpointing.
        block_matrix_state_bytes: optimizer state per element of the blocks' matrices; all other
            parameters have AdamW's.
    Returns: weights, copies, gradients, optimizer, activations, head, temporaries.
    """
    N = batch * tokens
    D = config.d_model
    embedding = 4 * config.padded_vocab_size * D
    weights = 4 * parameters(config) + embedding - 4 * config.vocab_size * D
    saved_state = (_ADAMW_STATE_BYTES - block_matrix_state_bytes) * matrices(config)
    kept_head = _head_bytes(config, N)
    activations = activation_bytes(config, batch, tokens, itemsize, recompute) - kept_head
    copies = itemsize * matrices(config) if itemsize < 4 else 0
    before = weights if accumulates else 0

    # forward of the head: the logits, or scaled gradients, of which the weight's is padded
    logits = _logits_bytes(config, N, itemsize) + 2 * itemsize * N * D  # norm and branch
    scaled = itemsize * N * D + embedding
    forward = (copies, before, activations, kept_head + max(logits, scaled), 0)

    # start of the backward
    recomputed = N * _dropped_bytes(config, itemsize, recompute)
    mlp = MLPS[config.mlp].backward_bytes(
        N, D, config.d_feedforward, itemsize, RECOMPUTATIONS[recompute].in_mlp
    )
    head = embedding + itemsize * N * D
    backward = (copies, before, activations, head, recomputed + mlp)

    # the backward of the first block, after the gradients of all others
    others = (config.n_layer - 1) / config.n_layer
    formed = before or int(others * (weights - embedding - 4 * positions(config)))
    first_block = (copies, formed, int((1 - others) * activations), head, recomputed + mlp)

    # the end: the embedding has a gradient as the head's weight and one as the input's table
    extra_embeddings = 2 if accumulates else 1
    update = (copies, weights, 0, embedding * extra_embeddings, 4 * N * D)

    fullest = max(forward, backward, first_block, update, key=sum)
    names = ("copies", "gradients", "activations", "head", "temporaries")
    parts = dict(zip(names, fullest, strict=True))
    return {"weights": weights, "optimizer": 2 * weights - saved_state, **parts}


def _logits_bytes(config: GPTConfig, N: int, itemsize: int) -> int:
    """A chunk's logits and their softmax, whose memory becomes the gradient.

    With several chunks the next one's logits are allocated before the last is freed. In 16 bits the
    head's weight is cast, and the reference widens it again; the kernels hold more logits instead.
    """
    V = config.vocab_size
    rows = block_rows(N, V)
    logits = 4 * rows * V * (2 if rows == N else 3)
    if itemsize == 4:
        return logits
    weight = config.d_model * V
    workspace = cost(N, config.d_model, V, itemsize)["workspace_bytes"]
    return itemsize * weight + max(logits + 4 * weight, workspace)
