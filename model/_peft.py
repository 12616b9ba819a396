"""LoRA and prefixes in the files of the package PEFT.

    adapter_config.json          which model and which layers it belongs to, rank, alpha
    adapter_model.safetensors    base_model.model.LAYER.lora_A.weight (r, n_in) and
                                 base_model.model.LAYER.lora_B.weight (n_out, r) of each layer

LAYER is the name of transformers. A layer of ours can be several layers there, such as q_proj,
k_proj and v_proj: its B is divided by rows, and each part gets the same A. `fan_in_fan_out` says
that the model stores its weights as (in, out), as GPT-2 does. A and B do not depend on it.

A prefix is one tensor, prompt_embeddings (P, L 2 G K): see prefix.py.

The header of adapter_model.safetensors also has the hash of the model's weights. PEFT ignores it.
"""

import collections
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ._families import FAMILIES, Family, family_of
from .config import GPTConfig
from .folder import new_folder, write_json
from .safetensors_file import DTYPES, write_safetensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_NAME_START = "base_model.model."
_PREFIX_KEY = "prompt_embeddings"
_HASH_KEY = "tritium_base_sha256"
# Options of PEFT that change what LoRA computes. tritium does not have them.
_UNSUPPORTED = (
    *("use_dora", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias"),
    *("use_qalora", "use_bdlora", "arrow_config", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "kasa_config", "velora_config", "monteclora_config"),
)
# Starts of `init_lora_weights` that also change the weights of the model.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LowRank(NamedTuple):
    """The change scale * B @ A of a weight (n_out, n_in).

    Args:
        A: (r, n_in).
        B: (n_out, r).
        scale: alpha / r.
    """

    A: Tensor
    B: Tensor
    scale: float


# --- names


def _parts(name: str, rows: int, config: GPTConfig, family: Family) -> list[tuple[str, slice]]:
    """Return PEFT's names of a layer of ours, each with its rows of the weight."""
    theirs = [
        _NAME_START + family.prefix + each.removesuffix(".weight")
        for each in family.names(f"{name}.weight")
    ]
    if len(theirs) == 1:
        return [(theirs[0], slice(0, rows))]
    ends = itertools.accumulate(config.qkv_rows)
    slices = [slice(end - count, end) for end, count in zip(ends, config.qkv_rows, strict=True)]
    return list(zip(theirs, slices, strict=True))


def _targets(names: list[str], n_layer: int) -> list[str]:
    """Return target_modules.

    The last two parts of a name if all blocks have LoRA there, else complete names.
    """
    ends = {name: ".".join(name.split(".")[-2:]) for name in names}
    count = collections.Counter(ends.values())
    targets = [
        end if count[end] == n_layer else name.removeprefix(_NAME_START)
        for name, end in ends.items()
    ]
    return list(dict.fromkeys(targets))


# --- out of a model


def write_adapter(
    folder: Path,
    matrices: dict[str, LowRank],
    config: GPTConfig,
    *,
    base: str,
    base_sha256: str,
    dropout: float,
) -> None:
    """Write LoRA as a folder that PEFT opens: the whole folder or nothing.

    Args:
        folder: must not exist, or be empty.
        matrices: LoRA of each layer, by our names. All have one rank and one scale.
        base: base_model_name_or_path.
        base_sha256: hash of the weights of the model.
        dropout: probability of dropout in training.
    Raises: InputError if the folder is in use, or if transformers has no such model.
    """
    family = FAMILIES[family_of(config)]
    tensors = {}
    for name, matrix in matrices.items():
        for theirs, rows in _parts(name, len(matrix.B), config, family):
            tensors[f"{theirs}.lora_A.weight"] = matrix.A
            tensors[f"{theirs}.lora_B.weight"] = matrix.B[rows]
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("A.weight")]
    first = next(iter(matrices.values()))
    rank = len(first.A)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank * first.scale,
        "lora_dropout": dropout,
        "target_modules": _targets(names, config.n_layer),
        "fan_in_fan_out": family.transposed is not None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    with new_folder(folder) as temporary:
        write_safetensors(temporary / ADAPTER_FILE, tensors, {_HASH_KEY: base_sha256})
        write_json(temporary / ADAPTER_CONFIG, fields)


def write_prefix(
    folder: Path, prefix: Tensor, config: GPTConfig, *, base: str, base_sha256: str
) -> None:
    """Write a prefix (P, L 2 G K) as a folder that PEFT opens. Arguments: see write_adapter."""
    family_of(config.with_prefix(0))
    fields = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "num_virtual_tokens": config.prefix_tokens,
        "num_layers": config.n_layer,
        "num_attention_heads": config.kv_heads,
        "token_dim": config.kv_heads * config.head_size,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": config.d_model,
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        write_safetensors(temporary / ADAPTER_FILE, {_PREFIX_KEY: prefix}, {_HASH_KEY: base_sha256})
        write_json(temporary / ADAPTER_CONFIG, fields)


# --- into a model


def is_adapter(path: Path) -> bool:
    """Return whether the path is a folder with an adapter of PEFT."""
    return (path / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises: InputError unless it describes an adapter."""
    file = folder / ADAPTER_CONFIG
    try:
        fields = json.loads(file.read_bytes())
        peft_type = fields["peft_type"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{file}: expected the configuration of an adapter of PEFT") from None
    if peft_type not in ("LORA", "PREFIX_TUNING"):
        raise InputError(f"{file}: expected peft_type LORA or PREFIX_TUNING, got {peft_type!r}")
    return fields


def is_prefix(folder: Path) -> bool:
    """Return whether an adapter is a prefix, and not LoRA."""
    return read_adapter_config(folder)["peft_type"] == "PREFIX_TUNING"


def read_prefix(folder: Path) -> tuple[Tensor, str | None]:
    """Read a prefix. Returns: prompt_embeddings, and the hash of the model's weights or None.

    Raises: InputError if a file is damaged, or if it is not a prefix without a projection.
    """
    fields = read_adapter_config(folder)
    if fields.get("prefix_projection"):
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: prefix_projection: expected false, got true; save the "
            "adapter after training, without its projection"
        )
    tensors, recorded = _read_tensors(folder / ADAPTER_FILE)
    if list(tensors) != [_PREFIX_KEY]:
        raise InputError(
            f"{folder / ADAPTER_FILE}: expected the tensor {_PREFIX_KEY}, got "
            f"{', '.join(list(tensors)[:2]) or 'none'}"
        )
    values = tensors[_PREFIX_KEY]
    tokens = fields.get("num_virtual_tokens", len(values))
    if tokens != len(values):
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: num_virtual_tokens: expected {len(values)}, as "
            f"{_PREFIX_KEY} has, got {tokens!r}"
        )
    return values, recorded


def check_base(folder: Path, recorded: str, found: str) -> None:
    """Raise InputError if an adapter was trained on other weights than those of the model.

    Args: recorded, found: hash of the weights in the adapter's file, and of the model.
    """
    if recorded != found:
        raise InputError(
            f"{folder}: expected the weights {recorded[:12]} that the adapter was trained on, got "
            f"{found[:12]}; the adapter belongs to another model of the same shape"
        )


def adapter_base(folder: Path) -> Path:
    """Return the folder of the model that an adapter belongs to.

    A relative path starts at the current folder, or next to the adapter.

    Raises: InputError if the adapter names no folder that exists.
    """
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if isinstance(name, str) and name:
        for path in (Path(name), folder.parent / name):
            if path.exists():
                return path
    raise InputError(
        f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: expected the folder of a model, got "
        f"{name!r}; write the path of the model there"
    )


def _checked_alpha(fields: dict[str, Any], file: Path) -> float:
    """Return lora_alpha. Raises: InputError for options that tritium does not have."""
    for option in _UNSUPPORTED:
        if fields.get(option):
            raise InputError(f"{file}: {option}: expected none, got {fields[option]!r}")
    if fields.get("bias", "none") != "none":
        raise InputError(f"{file}: bias: expected 'none', got {fields['bias']!r}")
    alpha = fields.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha):
        raise InputError(f"{file}: lora_alpha: expected a number, got {alpha!r}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"{file}: init_lora_weights: expected LoRA of unchanged weights, got {start!r}, which "
            "changes the weights of the model; convert the adapter with PEFT"
        )
    return alpha


def read_adapter(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: GPTConfig
) -> tuple[list[tuple[str, slice, LowRank]], str | None]:
    """Read LoRA for a model.

    Args:
        folder: has the two files of PEFT.
        shapes: of the weights of all linear layers of the model, by our names.
        config: of the model.
    Returns: for each layer in the file our name, rows of our weight, and their change; and the hash
        of the model's weights, None if the file has none.
    Raises: InputError if a file is damaged or unsupported, or if the shapes are another model's.
    """
    fields = read_adapter_config(folder)
    file = folder / ADAPTER_CONFIG
    alpha = _checked_alpha(fields, file)
    tensors, recorded = _read_tensors(folder / ADAPTER_FILE)
    family = FAMILIES[family_of(config)]
    places = {
        theirs: (name, rows)
        for name, shape in shapes.items()
        for theirs, rows in _parts(name, shape[0], config, family)
    }
    found = []
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        A = tensors.pop(key)
        B = tensors.pop(f"{layer}.lora_B.weight", None)
        if layer not in places:
            raise InputError(
                f"{folder}: expected layers of a model of {config.n_layer} blocks, got {layer}; "
                "the adapter belongs to another model"
            )
        name, rows = places[layer]
        n_out, n_in = rows.stop - rows.start, shapes[name][1]
        rank = len(A)
        if B is None or not rank or A.shape != (rank, n_in) or B.shape != (n_out, rank):
            got = [None if each is None else tuple(each.shape) for each in (A, B)]
            raise InputError(
                f"{folder}: {layer}: expected lora_A (r, {n_in}) and lora_B ({n_out}, r), got "
                f"{got[0]} and {got[1]}; the adapter belongs to another model"
            )
        if not fields.get("rank_pattern") and fields.get("r", rank) != rank:
            raise InputError(f"{file}: r: expected {rank}, as {layer} has, got {fields['r']!r}")
        scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
        found.append((name, rows, LowRank(A, B, scale)))
    if tensors or not found:
        got = ", ".join(list(tensors)[:2]) or "none"
        raise InputError(
            f"{folder / ADAPTER_FILE}: expected pairs of lora_A.weight and lora_B.weight of linear "
            f"layers, got {got}"
        )
    return found, recorded


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file, and the hash in its header."""
    try:
        with safe_open(file, framework="pt") as content:
            recorded = (content.metadata() or {}).get(_HASH_KEY)
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: damaged, missing, or not safetensors ({error}); get it again"
        ) from None
    for name, value in tensors.items():
        if value.dtype not in DTYPES or value.ndim != 2:
            raise InputError(
                f"{file}: {name}: expected a matrix of floats, got {value.dtype} "
                f"{tuple(value.shape)}"
            )
    return tensors, recorded
