"""Prefix tuning: train keys and values that stand before each sequence, and no other weight.

    attention    queries of a layer see P trained keys and values, then those of the tokens
    positions    token t has position P + t, as in the package PEFT. A prefix has no position: RoPE
                 does not rotate its keys
    context      config.context_tokens is P smaller than that of the model without a prefix

The parameter of the model is `prefix`, (P, L 2 G K): for each prefix token the key and the value of
each layer. It is PEFT's PrefixTuning without a projection. load_prefix and save_prefix read and
write PEFT's files.

Symbols    P prefix tokens, L layers, G key and value heads, K head size
Source     Li & Liang 2021, arXiv:2101.00190
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ._peft import check_base, is_prefix, read_prefix, write_prefix
from .config import GPTConfig
from .init import STANDARD_DEVIATION

if TYPE_CHECKING:
    from .gpt import GPT

__all__ = ["add_prefix", "is_prefix", "load_prefix", "prefix_shape", "read_prefix", "save_prefix"]


def prefix_shape(config: GPTConfig) -> tuple[int, int]:
    """Return the shape of the parameter `prefix`."""
    return config.prefix_tokens, config.n_layer * 2 * config.kv_heads * config.head_size


def add_prefix(model: "GPT", tokens: int, values: Tensor | None = None) -> None:
    """Give a GPT a prefix of `tokens` keys and values, in place.

    Args: values: (tokens, L 2 G K). Default: small random numbers.
    """
    model.config = model.config.with_prefix(tokens)
    weight = model.wte.weight
    prefix = torch.empty(prefix_shape(model.config), dtype=weight.dtype, device=weight.device)
    if values is None:
        prefix.normal_(0.0, STANDARD_DEVIATION)
    else:
        prefix.copy_(values)
    model.prefix = nn.Parameter(prefix)


def save_prefix(model: "GPT", folder: Path, *, base: str, base_sha256: str) -> None:
    """Write the prefix of a model as a folder that PEFT opens.

    Args:
        folder: must not exist, or be empty.
        base: name or folder of the model without the prefix.
        base_sha256: hash of its weights, as base_sha256 of lora.py returns it.
    Raises: InputError if the folder is in use, or if transformers has no such model.
    """
    write_prefix(folder, model.prefix.detach(), model.config, base=base, base_sha256=base_sha256)


def load_prefix(model: "GPT", folder: Path, base_sha256: str) -> None:
    """Give a GPT the prefix in a folder of PEFT, in place.

    Raises: InputError if the files are damaged, or belong to another model.
    """
    values, recorded = read_prefix(folder)
    config = model.config
    if recorded is not None:
        check_base(folder, recorded, base_sha256)
    if len(values) >= config.context_tokens:
        raise InputError(
            f"{folder}: expected fewer prefix tokens than the context of {config.context_tokens} "
            f"tokens, got {len(values)}"
        )
    expected = prefix_shape(config.with_prefix(len(values)))
    if tuple(values.shape) != expected:
        raise InputError(
            f"{folder}: prompt_embeddings: expected shape {expected}, got {tuple(values.shape)}; "
            "the adapter belongs to another model"
        )
    add_prefix(model, len(values), values)
