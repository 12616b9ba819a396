"""What a GPT costs, as formulas: parameters, FLOPs a token, bytes of activations.

    parameters   N = V D + C D + L (norms 2 D + qkv D (D + 2 G K) + projection D^2 + MLP 2 D F) + D; biases have as many
                 numbers as their layer has outputs: L (2 D + D + 2 G K + D + F + D) + D
    FLOPs        6 (N - C D) + 12 L D T a token, forward and backward: two for each multiply-add, the backward twice the
                 forward; attention counted in full, although causal kernels do half. What MFU is reported with.
    activations  what autograd keeps between forward and backward, see activation_bytes

Source     Chowdhery et al. 2022, arXiv:2204.02311, appendix B, for FLOPs and MFU
"""

from .config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Trainable numbers, without the embedding's rows added for alignment: the figure that models are known by."""
    D, F, KV = config.d_model, config.d_feedforward, config.kv_heads * config.head_size
    matrices = D * (D + 2 * KV) + D * D + 2 * D * F
    gains, outputs = 2 * D, D + 2 * KV + D + F + D
    biases = config.n_layer * (gains + outputs) + D if config.bias else 0
    embeddings = (config.vocab_size + config.context_tokens) * D
    return embeddings + config.n_layer * (matrices + gains) + D + biases


def flops_per_token(config: GPTConfig, tokens: int) -> int:
    """FLOPs of forward and backward for each token of a sequence of `tokens`."""
    counted = parameters(config) - config.context_tokens * config.d_model
    return 6 * counted + 12 * config.n_layer * config.d_model * tokens


def activation_bytes(config: GPTConfig, batch: int, tokens: int, itemsize: int) -> int:
    """Bytes kept between forward and backward of the loss of `batch` sequences of `tokens`, weights not counted.

    A block keeps for each token the inputs of its two norms and of qkv, projection and MLP (5 D), q k v (D + 2 G K), the MLP's
    hidden layer before and after GELU (2 F), all of `itemsize` bytes, and float32 statistics: mean and deviation of two norms,
    log-sum-exp of H heads. The head keeps the gradients that it has formed already, in float32.
    """
    D, F, KV = config.d_model, config.d_feedforward, config.kv_heads * config.head_size
    block = (5 * D + D + 2 * KV + 2 * F) * itemsize + 4 * (4 + config.n_head)
    final_norm = D * itemsize + 4 * 2
    token_ids = 8
    head = 4 * D
    per_token = config.n_layer * block + final_norm + head + token_ids
    position_ids, counted, weight_gradient = 8 * tokens, 8, 4 * config.vocab_size * D
    return batch * tokens * per_token + position_ids + counted + weight_gradient
