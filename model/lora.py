"""LoRA: train small matrices that are added to the frozen weights of a model.

    forward    y = x w^T + b + s drop(x) A^T B^T      s = lora_alpha / lora
    start      A is uniform in +-1 / sqrt(n_in), B is 0: the model computes what it did before
    merged     w + s B A: a plain layer, which computes the same without dropout

add_lora replaces linear layers by LoraLinear and freezes all other weights of a GPT. Frozen weights
get no gradient and no optimizer state. A layer without LoRA computes as before. An MLP whose layers
have LoRA runs one linear layer after the other, because the fused operators take one weight per
layer.

save_adapter and merge_adapter write and read the files of the package PEFT.

Shapes     x (N, n_in)   w (n_out, n_in)   A (lora, n_in)   B (n_out, lora)
Precision  A and B are float32 masters, as other weights are; both matmuls run in the dtype of x
Source     Hu et al. 2021, arXiv:2106.09685
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError, unknown_name
from ..kernels import linear
from ..kernels.core.dropout import Dropout, kept_elements
from ._peft import LowRank, adapter_base, check_base, is_adapter, read_adapter, write_adapter
from .choices import MLPS
from .config import AdapterOptions, GPTConfig
from .context import Branch
from .layers import Attention, Linear
from .safetensors_file import flat_bytes

if TYPE_CHECKING:
    from .gpt import GPT

__all__ = [
    "LoraLinear",
    "adapter_base",
    "add_lora",
    "base_sha256",
    "check_adapter",
    "freeze",
    "is_adapter",
    "is_lora",
    "lora_layers",
    "lora_parameters",
    "merge_adapter",
    "merge_lora",
    "save_adapter",
]

# The modules of a GPT. A subclass can have more, such as a classification head: they are trained.
_FROZEN = ("wte", "wpe", "h", "ln_f", "lm_head")
# Names that Llama models of transformers have for one of our layers.
_LLAMA_NAMES = {
    "o_proj": "attn.c_proj",
    "gate_proj": "mlp.c_gate",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}
_LLAMA_QKV = ("q_proj", "k_proj", "v_proj")
# Names of layers in other families, and the layer of a GPT-2 with the same work.
_GPT2_NAMES = {
    **dict.fromkeys((*_LLAMA_QKV, "query_key_value", "qkv_proj"), "c_attn"),
    **{"o_proj": "attn.c_proj", "out_proj": "attn.c_proj"},
    **dict.fromkeys(("gate_proj", "up_proj", "fc_in"), "c_fc"),
    **dict.fromkeys(("down_proj", "fc_out"), "mlp.c_proj"),
}


class LoraLinear(Linear):
    """A frozen linear layer with two trained matrices: see the top of this file.

    Args:
        base: the layer. Its parameters are shared, and frozen.
        rank, alpha, dropout: as in AdapterOptions.
    """

    is_plain = False

    def __init__(self, base: Linear, *, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        n_out, n_in = base.weight.shape
        self.weight = base.weight
        self.bias = base.bias
        self.requires_grad_(False)
        options = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, **options))
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, **options))
        self.lora_A.data.uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in))
        self.scale = alpha / rank
        self.dropout_p = dropout

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        y = linear(x, self.weight, self.bias)
        if seed is not None and self.dropout_p:
            x = _drop(x, self.dropout_p, seed)
        return torch.add(y, linear(linear(x, self.lora_A), self.lora_B), alpha=self.scale)

    def branch(self, x: Tensor, seed: Tensor | None = None) -> Branch:
        # The bias is frozen, so the next norm need not compute its gradient.
        return Branch(self(x, seed), None)

    @torch.no_grad()
    def merged(self) -> Linear:
        """Return a plain layer with the weight w + s B A. It shares no weight with this one."""
        n_out, n_in = self.weight.shape
        with torch.device("meta"):
            plain = Linear(n_in, n_out, bias=self.bias is not None)
        change = self.lora_B.double() @ self.lora_A.double()
        weight = torch.add(self.weight.double(), change, alpha=self.scale)
        plain.weight = nn.Parameter(weight.to(self.weight.dtype))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone())
        return plain


def _drop(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Drop elements of x (N, n_in). The mask is a function of the seed."""
    kept = kept_elements(*x.shape, Dropout(dropout_p=dropout_p, seed=seed))
    return torch.where(kept, x, 0) * (1 / (1 - dropout_p))


# --- into and out of a model


def add_lora(model: "GPT", options: AdapterOptions) -> None:
    """Give linear layers LoRA, and freeze all other weights of a GPT, in place.

    The generator of PyTorch draws A. Modules that a subclass adds to GPT stay trained.

    Raises: InputError for a target that the model does not have, or a rank that is too large.
    """
    layers = _checked_layers(model.config, options)
    freeze(model)
    for name in layers:
        layer = LoraLinear(
            model.get_submodule(name),
            rank=options.lora,
            alpha=options.alpha,
            dropout=options.lora_dropout,
        )
        _replace(model, name, layer)
    model.adapter = options


def freeze(model: "GPT") -> None:
    """Freeze all weights of a GPT except its prefix and what a subclass adds, in place."""
    for child in _FROZEN:
        if hasattr(model, child):
            getattr(model, child).requires_grad_(False)


def merge_lora(model: "GPT") -> None:
    """Add LoRA to the weights, and make all weights trainable again, in place."""
    for name in dict(_lora_linears(model)):
        _replace(model, name, model.get_submodule(name).merged())
    model.adapter = None
    model.requires_grad_(True)


def lora_layers(config: GPTConfig, targets: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Return the linear layers that targets name, and the shapes of their weights.

    Args:
        config: of the model.
        targets: names of layers, or how their names end: "c_proj" names the last layers of
            attention and of the MLP, "attn.c_proj" one of them. Models of the Llama family also
            have the names of transformers. Empty: all linear layers of blocks.
    Returns: (n_out, n_in) by name, in the order of the model.
    Raises: InputError for a target that names no layer.
    """
    with torch.device("meta"):
        block = nn.ModuleDict({"attn": Attention(config), "mlp": MLPS[config.mlp].module(config)})
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    }
    layers = {
        f"h.{layer}.{name}": shape
        for layer in range(config.n_layer)
        for name, shape in shapes.items()
    }
    if not targets:
        return layers
    has_llama_names = MLPS[config.mlp].has_gate
    wanted = list(targets)
    if has_llama_names:
        wanted = [_LLAMA_NAMES.get(target, target) for target in wanted]
        if set(_LLAMA_QKV) <= set(wanted):
            wanted = ["c_attn", *(target for target in wanted if target not in _LLAMA_QKV)]
    chosen = set()
    for target in wanted:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found and has_llama_names and target in _LLAMA_QKV:
            raise InputError(
                f"lora_targets: expected all of {', '.join(_LLAMA_QKV)}, which are one layer "
                f"here, got {target} without the others; give all three, or c_attn"
            )
        if not found:
            known = dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers)
            known |= dict.fromkeys(_LLAMA_NAMES if has_llama_names else ())
            message = unknown_name("layer", target, known)
            if not has_llama_names and target in _GPT2_NAMES:
                message = f"unknown layer {target!r}; did you mean {_GPT2_NAMES[target]!r}?"
            raise InputError(f"lora_targets: {message}")
        chosen.update(found)
    return {name: shape for name, shape in layers.items() if name in chosen}


def check_adapter(options: AdapterOptions, config: GPTConfig, recompute: str) -> None:
    """Raise InputError if LoRA does not fit the model or its mode of activation checkpointing."""
    if not options.lora:
        return
    layers = _checked_layers(config, options)
    if recompute == "gelu" and any(".mlp." in name for name in layers):
        raise InputError(
            "recompute: expected none, selective or block with LoRA in the MLP, got gelu, which "
            "needs the fused MLP; or set `lora_targets` to c_attn and attn.c_proj"
        )


def _checked_layers(config: GPTConfig, options: AdapterOptions) -> dict[str, tuple[int, int]]:
    """Return the layers with LoRA. Raise InputError if the rank exceeds the smaller size of one."""
    layers = lora_layers(config, options.lora_targets)
    name = min(layers, key=lambda name: min(layers[name]))
    if options.lora > min(layers[name]):
        raise InputError(
            f"lora: expected a rank of at most {min(layers[name])}, the smaller size of {name} "
            f"{layers[name]}, got {options.lora}; a larger one adds weights without effect"
        )
    return layers


def lora_parameters(config: GPTConfig, options: AdapterOptions | None) -> int:
    """Return the number of elements of LoRA. 0 without LoRA."""
    if options is None or not options.lora:
        return 0
    shapes = lora_layers(config, options.lora_targets).values()
    return options.lora * sum(n_out + n_in for n_out, n_in in shapes)


def is_lora(name: str) -> bool:
    """Return whether a parameter belongs to LoRA, by its name."""
    return name.endswith((".lora_A", ".lora_B"))


def _lora_linears(model: "GPT") -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


# --- PEFT's files


def save_adapter(model: "GPT", folder: Path, *, base: str) -> None:
    """Write LoRA, without the model's own weights, as a folder that PEFT opens.

    The file also records a hash of the frozen weights, which merge_adapter compares.

    Args:
        model: a GPT after add_lora.
        folder: must not exist, or be empty.
        base: name or folder of the model that the adapter belongs to.
    Raises: InputError if the folder is in use, or if transformers has no such model.
    """
    options = model.adapter
    matrices = {
        name: LowRank(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
        for name, layer in _lora_linears(model)
    }
    write_adapter(
        folder,
        matrices,
        model.config,
        base=base,
        base_sha256=base_sha256(model),
        dropout=options.lora_dropout,
    )


@torch.no_grad()
def merge_adapter(model: "GPT", folder: Path) -> None:
    """Add a LoRA adapter of PEFT to the weights of a model, in place.

    Args:
        model: the model that the adapter was trained on.
        folder: has adapter_config.json and adapter_model.safetensors.
    Raises: InputError if the files are damaged, hold something else than LoRA of linear layers, or
        belong to another model.
    """
    parts, recorded = read_adapter(folder, lora_layers(model.config), model.config)
    if recorded is not None:
        check_base(folder, recorded, base_sha256(model))
    for name, rows, matrix in parts:
        weight = model.get_submodule(name).weight[rows]
        delta = (matrix.B.double() @ matrix.A.double()).mul_(matrix.scale)
        weight.copy_(weight.double() + delta)


@torch.no_grad()
def base_sha256(model: "GPT") -> str:
    """Return a hash of the weights of a GPT without LoRA: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if is_lora(name) or name.split(".")[0] not in _FROZEN:
            continue
        if name in ("wte.weight", "lm_head.weight"):
            value = value[: model.config.vocab_size]
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(flat_bytes(value.float().cpu()).numpy().data)
    return digest.hexdigest()
