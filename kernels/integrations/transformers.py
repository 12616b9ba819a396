"""Use the kernels in GPT-2 and Llama-like models of transformers, from 4.56.

    from tritium.kernels.integrations.transformers import patch, unpatch

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    patch(model)      # then Trainer, accelerate, generate() as before
    unpatch(model)    # the model is what it was

`patch` replaces attention, norms, MLPs, the first residual addition of each block, and the loss of
the language model in training. It changes no parameter, and nothing in a saved config.json.

In training mode, with labels, the head computes the loss without logits, and outputs.logits is
None. Pass skip_logits=False to the forward to get logits. In evaluation mode the forward returns
logits as before.

docs/kernels.md has the differences in numerics, and the tested versions.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import transformers
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ...errors import unknown_name
from ..attention.options import MAX_HEAD_SIZE
from ..modules import LayerNorm
from . import _transformers_attention as attention
from . import _transformers_forward as forwards

# GPT-2 of 4.54 and older builds masks without AttentionMaskInterface: padding would be ignored.
OLDEST = (4, 56)
if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(
        f"tritium.kernels.integrations.transformers: expected transformers 4.56 or newer, "
        f"got {transformers.__version__}; upgrade it"
    )

PARTS = ("attention", "norm", "mlp", "residual", "loss")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The classes of a family of models, by their names in its file of transformers."""

    file: str
    attention: str
    mlp: str
    block: str
    base: str
    head: str
    norm: str | None
    """None: torch.nn.LayerNorm."""
    forwards: dict[str, Callable]
    """Forward by part: mlp, block, head, norm."""


def _llama_like(name: str, prefix: str) -> Family:
    return Family(
        file=f"transformers.models.{name}.modeling_{name}",
        attention=f"{prefix}Attention",
        mlp=f"{prefix}MLP",
        block=f"{prefix}DecoderLayer",
        base=f"{prefix}Model",
        head=f"{prefix}ForCausalLM",
        norm=f"{prefix}RMSNorm",
        forwards={
            "norm": forwards.rms_norm_forward,
            "mlp": forwards.llama_mlp_forward,
            "block": forwards.llama_block_forward,
            "head": forwards.llama_head_forward,
        },
    )


FAMILIES = {
    "gpt2": Family(
        file="transformers.models.gpt2.modeling_gpt2",
        attention="GPT2Attention",
        mlp="GPT2MLP",
        block="GPT2Block",
        base="GPT2Model",
        head="GPT2LMHeadModel",
        norm=None,
        forwards={
            "mlp": forwards.gpt2_mlp_forward,
            "block": forwards.gpt2_block_forward,
            "head": forwards.gpt2_head_forward,
        },
    ),
    "llama": _llama_like("llama", "Llama"),
    "mistral": _llama_like("mistral", "Mistral"),
    "qwen2": _llama_like("qwen2", "Qwen2"),
    "qwen3": _llama_like("qwen3", "Qwen3"),
}

# Public attributes of the replaced modules, in all supported versions. Any other attribute means
# that the module may compute something else.
_GPT2_ATTENTION = (
    *(
        "config",
        "embed_dim",
        "num_heads",
        "head_dim",
        "split_size",
        "scale_attn_weights",
        "scaling",
    ),
    *("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "is_cross_attention"),
    *("layer_idx", "is_causal", "pruned_heads", "bias", "masked_bias"),
    *("c_attn", "c_proj", "attn_dropout", "resid_dropout"),
)
_LLAMA_ATTENTION = (
    *("config", "layer_idx", "layer_type", "head_dim", "num_key_value_groups", "scaling"),
    *("attention_dropout", "is_causal", "sliding_window", "rotary_fn"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
)
_LLAMA_MLP = (
    *("config", "hidden_size", "intermediate_size"),
    *("gate_proj", "up_proj", "down_proj", "act_fn"),
)
_LLAMA_BLOCK = (
    *("hidden_size", "attention_type", "self_attn", "mlp"),
    *("input_layernorm", "post_attention_layernorm"),
)
ATTRIBUTES = {
    "attention": {*_GPT2_ATTENTION, *_LLAMA_ATTENTION},
    "mlp": {"c_fc", "c_proj", "act", "dropout", *_LLAMA_MLP},
    "block": {"ln_1", "attn", "ln_2", "gradient_checkpointing", *_LLAMA_BLOCK},
    "norm": {"weight", "bias", "eps", "normalized_shape", "elementwise_affine", "variance_epsilon"},
}
# Attributes of attention, and the only value with which the kernels compute the same.
REQUIRED = {
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "is_cross_attention": False,
    "is_causal": True,
    "pruned_heads": set(),
}
# Which modules each part replaces.
ROLES = {"norm": "norm", "mlp": "mlp", "residual": "block", "loss": "head", "attention": "base"}


def patch(model: PreTrainedModel, parts: Iterable[str] = PARTS) -> PreTrainedModel:
    """Make a model of transformers use the kernels. A call that raises changes nothing.

    Patch before accelerate prepares the model, and before get_peft_model.

    Args:
        model: a model of a family in FAMILIES, with any head. The part "loss" applies to the head
            of the causal language model only. A patched model is first unpatched.
        parts: what to replace, names in PARTS. Default: all. "residual" needs "norm".
    Returns: the same model.
    Raises: ValueError for an unknown part, an unsupported class of model, or a module with an
        attribute or an option that the kernels do not honour.
    """
    parts = _checked_parts(parts)
    # Check everything before the first change.
    family = _family_of(model)
    modules = list(_modules_of(model, _classes_of(family)))
    for name, role, module in modules:
        _check_module(name, role, module)

    for _, _, module in modules:
        # transformers 4.56 leaves a reference to the forward of the class.
        vars(module).pop("forward", None)
    for module in model.modules():
        if "_tritium_previous_attention" in vars(module):
            unpatch(module)
    for part in parts:
        for _, role, module in modules:
            if role == ROLES[part]:
                module.__class__ = _replacement(family, role, type(module))
    previous = model.config._attn_implementation
    if "attention" in parts:
        _set_attention(model, attention.NAME)
    model._tritium_previous_attention = previous
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Give a patched model the classes and the attention that it had before.

    Returns: the same model.
    Raises: ValueError if the model is not patched.
    """
    if not hasattr(model, "_tritium_previous_attention"):
        raise ValueError(f"unpatch: expected a patched model, got {type(model).__name__}")
    for module in model.modules():
        if forwards.is_subclass_of_patched(module):
            raise ValueError(
                f"unpatch: expected the class that patch gave a module, got its subclass "
                f"{type(module).__name__}; unpatch before fully_shard or parametrizations"
            )
    for module in model.modules():
        original = forwards.original_class(module)
        if original is not None:
            module.__class__ = original
    if model.config._attn_implementation == attention.NAME:
        _set_attention(model, model._tritium_previous_attention)
    del model._tritium_previous_attention
    return model


def patch_classes(families: Iterable[str] = tuple(FAMILIES), parts: Iterable[str] = PARTS) -> None:
    """Patch all models of these families that are built from now on, also by from_pretrained.

    A model that is built with another attn_implementation than "sdpa", the default, keeps it.
    unpatch_classes() ends it; models that exist stay patched.

    Args:
        families: names in FAMILIES. Default: all.
        parts: as for `patch`.
    Raises: ValueError for an unknown family or part. Building an unsupported model raises as
        `patch` does.
    """
    parts = _checked_parts(parts)
    if isinstance(families, str):
        raise ValueError(f"patch_classes: families must be a list of names, got {families!r}")
    families = list(families)
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"patch_classes: {unknown_name('family', name, FAMILIES)}")
    unpatch_classes()
    for name in families:
        for cls in _models_in(FAMILIES[name]):
            _INITS[cls] = cls.__init__
            cls.__init__ = _patching_init(cls, cls.__init__, parts)


def unpatch_classes() -> None:
    """Undo patch_classes(): models that are built from now on are not patched."""
    while _INITS:
        cls, init = _INITS.popitem()
        cls.__init__ = init


# Constructors that patch_classes() has replaced, by class.
_INITS: dict[type, Callable] = {}


def _patching_init(cls: type, init: Callable, parts: tuple[str, ...]) -> Callable:
    @functools.wraps(init)
    def init_and_patch(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self) is not cls:  # inside the constructor of a subclass
            return
        if self.config._attn_implementation in ("sdpa", attention.NAME):
            patch(self, parts)
        else:
            patch(self, [part for part in parts if part != "attention"])

    return init_and_patch


def _models_in(family: Family) -> list[type]:
    """Return the model classes that a file of transformers defines, without abstract ones."""
    file = importlib.import_module(family.file)
    return [
        cls
        for cls in vars(file).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == family.file
        and not cls.__name__.endswith("PreTrainedModel")
    ]


def _checked_parts(parts: Iterable[str]) -> tuple[str, ...]:
    if isinstance(parts, str):
        raise ValueError(f"patch: parts must be a list of names, got {parts!r}")
    parts = tuple(parts)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"patch: {unknown_name('part', part, PARTS)}")
    if "residual" in parts and "norm" not in parts:
        raise ValueError(
            f"patch: the part 'residual' needs 'norm', which does the addition, got {list(parts)}"
        )
    return parts


def _family_of(model: nn.Module) -> Family:
    """Return the family of a model. Raise unless its class is one of transformers' own."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"patch: expected a PreTrainedModel, got {name}; pass the model inside of the wrapper"
        )
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"patch: {name}: {unknown_name('model type', model.config.model_type, FAMILIES)}"
        )
    if type(model).__module__ != family.file:
        raise ValueError(
            f"patch: {name} must be a class of {family.file}, got one of {type(model).__module__}"
        )
    return family


def _classes_of(family: Family) -> dict[type, str]:
    """Return the roles of the classes that `patch` replaces or checks."""
    file = importlib.import_module(family.file)
    roles = ("attention", "mlp", "block", "base", "head")
    classes = {getattr(file, getattr(family, role)): role for role in roles}
    return classes | {getattr(file, family.norm) if family.norm else nn.LayerNorm: "norm"}


def _modules_of(model: nn.Module, classes: dict[type, str]):
    """Yield name, role and module. Raise for a subclass, which may have another forward."""
    for name, module in model.named_modules():
        role = classes.get(forwards.original_class(module) or type(module))
        if role is not None:
            yield name, role, module
            continue
        bases = [base.__name__ for base in classes if isinstance(module, base)]
        if bases and not isinstance(module, PreTrainedModel):
            raise ValueError(
                f"patch: {name}: expected {bases[0]}, got the subclass {type(module).__name__}"
            )


def _check_module(name: str, role: str, module: nn.Module) -> None:
    """Raise a ValueError if a module may compute something else than the kernels."""
    where = f"patch: {type(module).__name__} {name!r}".removesuffix(" ''")
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"{where}: expected the forward of its class, got another one; patch before "
            "accelerate, kernels or other libraries replace it"
        )
    if role in ATTRIBUTES:
        public = {attribute for attribute in vars(module) if not attribute.startswith("_")}
        public |= {*module._parameters, *module._buffers, *module._modules}
        unknown = sorted(public - ATTRIBUTES[role] - set(vars(nn.Module())) - {"forward"})
        if unknown:
            raise ValueError(f"{where}: unknown attribute {unknown[0]!r}; it may change the result")
    if role == "attention":
        _check_attention(where, module)
    if role == "mlp":
        activation = type(getattr(module, "act", None) or module.act_fn).__name__
        known = forwards.GELUS if hasattr(module, "act") else forwards.SILUS
        if activation not in known:
            raise ValueError(f"{where}: {unknown_name('activation', activation, known)}")
    if role == "norm" and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        raise ValueError(f"{where}: expected one normalized axis, got {module.normalized_shape}")


def _check_attention(where: str, module: nn.Module) -> None:
    for attribute, expected in REQUIRED.items():
        value = getattr(module, attribute, expected)
        if value != expected:
            raise ValueError(f"{where}: {attribute} must be {expected}, got {value}")
    # Old versions pass no scale to the attention function.
    if not hasattr(module, "scaling") and not module.scale_attn_weights:
        raise ValueError(f"{where}: scale_attn_weights must be True, got False")
    if module.head_dim > MAX_HEAD_SIZE:
        raise ValueError(
            f"{where}: head_dim must be at most {MAX_HEAD_SIZE}, got {module.head_dim}"
        )


def _replacement(family: Family, role: str, original: type) -> type:
    """Return the class that a module gets."""
    if role == "norm" and family.norm is None:
        return LayerNorm
    forward = forwards.model_forward if role == "base" else family.forwards[role]
    return forwards.patched_class(original, forward)


def _set_attention(model: nn.Module, name: str) -> None:
    """Choose the attention function of a model and of its parts."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        config._attn_implementation = name
