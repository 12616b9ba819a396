"""What a GPT costs, as formulas: parameters, FLOPs a token, bytes of activations and of a whole training step.

    parameters   N = V D + C D + L (norms 2 D + qkv D (D + 2 G K) + projection D^2 + MLP 2 D F, gated 3 D F) + D, where C is 0
                 with rotary positions; biases have as many numbers as their layer has outputs, but rms norms and gated
                 perceptrons have none: L (2 D + D + 2 G K + D + F + D) + D
    FLOPs        6 (N - C D) + 12 L D T a token, forward and backward: two for each multiply-add, the backward twice the
                 forward; attention counted in full, although causal kernels do half. What MFU is reported with.
    activations  what autograd keeps between forward and backward, see activation_bytes
    a step       everything alive at its fullest moment, see step_bytes

Source     Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for FLOPs and MFU
"""

from ..kernels.loss.linear_cross_entropy import block_rows, cost
from .config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Trainable numbers, without the embedding's rows added for alignment: the figure that models are known by."""
    D = config.d_model
    gains, outputs = 2 * D, D + 2 * _kv_width(config) + D
    outputs += config.d_feedforward + D if config.mlp == "gelu" else 0
    norm_biases = config.n_layer * gains + D if config.norm == "layer" else 0
    biases = norm_biases + config.n_layer * outputs if config.bias else 0
    return (
        config.vocab_size * D
        + positions(config)
        + matrices(config)
        + config.n_layer * gains
        + D
        + biases
    )


def matrices(config: GPTConfig) -> int:
    """Numbers in the weight matrices of all blocks."""
    D = config.d_model
    mlp = (2 if config.mlp == "gelu" else 3) * D * config.d_feedforward
    return config.n_layer * (D * (D + 2 * _kv_width(config)) + D * D + mlp)


def positions(config: GPTConfig) -> int:
    """Numbers of the table of positions."""
    return config.context_tokens * config.d_model if config.position == "learned" else 0


def _kv_width(config: GPTConfig) -> int:
    return config.kv_heads * config.head_size


def flops_per_token(config: GPTConfig, tokens: int) -> int:
    """FLOPs of forward and backward for each token of a sequence of `tokens`."""
    return (
        6 * (parameters(config) - positions(config)) + 12 * config.n_layer * config.d_model * tokens
    )


def activation_bytes(
    config: GPTConfig, batch: int, tokens: int, itemsize: int, recompute: str = "none"
) -> int:
    """Bytes kept between forward and backward of the loss of `batch` sequences of `tokens`, weights not counted.

    A block keeps for each token the inputs of qkv, projection and MLP (3 D), q k v (D + 2 G K), with rotary positions q and k
    turned as well (D + G K), the MLP's hidden layer before and after GELU, or gate and value (2 F), and the residual stream
    that its two norms read (2 D), of `itemsize` bytes: 4, or 2 in 16 bits. In float32 either way are statistics: mean, unless
    of an rms norm, and deviation of two norms, log-sum-exp of H heads. The head keeps the gradients that it has formed
    already, in float32; rotary positions two tables of K / 2 columns.

    With `recompute`, one of recompute.RECOMPUTATIONS, a block keeps less: without GELU's output (F), or of all of this nothing
    or attention's output and log-sum-exp, but its inputs: stream and branch (2 D), in the first block the stream alone.
    """
    D, rotary = config.d_model, config.position == "rotary"
    block = _block_bytes(config, itemsize) - _recomputed_bytes(config, itemsize, recompute)
    inputs = (2 * config.n_layer - 1) * D * itemsize if recompute in ("selective", "block") else 0
    final_norm = itemsize * D + 4 * (2 if config.norm == "layer" else 1)
    token_ids = 8
    per_token = config.n_layer * block + inputs + final_norm + token_ids
    positions, divisor = tokens * (4 * config.head_size if rotary else 8), 8
    return batch * tokens * per_token + positions + divisor + _head_bytes(config, batch * tokens)


def _block_bytes(config: GPTConfig, itemsize: int) -> int:
    """What a block keeps for each token."""
    D, KV = config.d_model, _kv_width(config)
    statistics = 2 if config.norm == "layer" else 1
    turned = D + KV if config.position == "rotary" else 0
    return (5 * D + D + 2 * KV + turned + 2 * config.d_feedforward) * itemsize + 4 * (
        2 * statistics + config.n_head
    )


def _recomputed_bytes(config: GPTConfig, itemsize: int, recompute: str) -> int:
    """What of that it does not keep, but makes again in its backward."""
    block, attention = _block_bytes(config, itemsize), config.d_model * itemsize + 4 * config.n_head
    return {
        "none": 0,
        "gelu": config.d_feedforward * itemsize,
        "selective": block - attention,
        "block": block,
    }[recompute]


def _head_bytes(config: GPTConfig, rows: int) -> int:
    """The float32 gradients of the head's inputs and weight."""
    return cost(rows, config.d_model, config.vocab_size, 4)["saved_bytes"]


def step_bytes(
    config: GPTConfig,
    batch: int,
    tokens: int,
    itemsize: int,
    *,
    accumulates: bool,
    recompute: str = "none",
) -> dict[str, int]:
    """Bytes alive at the fullest moment of a training step with AdamW, by part: what they are for.

    That moment is one of four. In the head's forward there are logits; at the start of the backward there are all activations
    beside what the last block makes again and its MLP computes for its gradient; in the first block there is that, and the
    gradients of all others; at the end all gradients have been formed. In between activations are freed and gradients formed
    at an even pace, so no moment in between has more of both. Scores of attention's reference stay below the MLP's share where
    heads are 64 wide, and are left out.

    Args:
        batch, tokens: sequences at once and their length.
        itemsize: 4; 2 for products in 16 bits, with copies of the float32 weights of all linear maps.
        accumulates: whether gradients exist before the forward: of micro-batches before this one, or in a reducer's buckets.
        recompute: as for activation_bytes.
    Returns: weights, copies, gradients, optimizer, activations, head, temporaries.
    """
    N, D, F, V = batch * tokens, config.d_model, config.d_feedforward, config.vocab_size
    embedding = 4 * config.padded_vocab_size * D
    weights = 4 * parameters(config) + embedding - 4 * V * D
    kept = _head_bytes(config, N)
    activations = activation_bytes(config, batch, tokens, itemsize, recompute) - kept
    is_narrow = itemsize < 4
    copies = itemsize * matrices(config) if is_narrow else 0
    before = weights if accumulates else 0

    rows = block_rows(N, V)
    # A chunk's logits and their softmax, which becomes their gradient; the next chunk's begin while that one is still there.
    logits = 4 * rows * V * (2 if rows == N else 3)
    if is_narrow:
        # The head's weight is cast, and its reference widens it again; the kernels do not, but hold more logits.
        logits = itemsize * V * D + max(
            logits + 4 * V * D, cost(N, D, V, itemsize)["workspace_bytes"]
        )
    norm_and_branch = 2 * itemsize * N * D
    # Scaling the gradients of the head makes new ones, the weight's then as long as the padded embedding.
    scaled = itemsize * N * D + embedding
    forward = (copies, before, activations, kept + max(logits + norm_and_branch, scaled), 0)

    # An MLP's da, dw2 and dh, before which autograd lets go of a where it differentiates PyTorch's functions.
    mlp = (2 if is_narrow or recompute == "gelu" else 1) * itemsize * N * F + itemsize * F * D
    if config.mlp == "swiglu":
        # da, the gate's sigmoid and SiLU, both gradients and a; in 16 bits the gate too, and three of them rounded back. Then
        # weights' gradients beside all of it but, in 16 bits, one.
        mlp = (4 * 4 + 3 * itemsize if is_narrow else 6 * 4) * N * F
        mlp += max(3 * itemsize * F * D, 4 * N * F if is_narrow else 0)
    again = N * _recomputed_bytes(config, itemsize, recompute)
    head = embedding + itemsize * N * D
    backward = (copies, before, activations, head, again + mlp)
    others = (config.n_layer - 1) / config.n_layer
    formed = before or int(others * (weights - embedding - 4 * positions(config)))
    first_block = (copies, formed, int((1 - others) * activations), head, again + mlp)

    # The embedding's gradients as the head's weight and as the input's table, of which one is in `weights` unless accumulated.
    update = (copies, weights, 0, embedding * (2 if accumulates else 1), 4 * N * D)
    fullest = max(forward, backward, first_block, update, key=sum)
    names = ("copies", "gradients", "activations", "head", "temporaries")
    return {"weights": weights, "optimizer": 2 * weights, **dict(zip(names, fullest, strict=True))}
