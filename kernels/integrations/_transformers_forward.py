"""Forwards that replace those of transformers, and the classes that carry them.

A patched module keeps its parameters and gets another class: a subclass of its own class with the
same name and another forward. isinstance, state dicts, hooks, and checks by class name therefore
work as before. Copying and pickling keep the subclass.

A fused forward reads the weights of its layers directly. If one of these layers is not a plain one
(a LoRA adapter, quantized weights, hooks, parametrizations), the original forward runs, which calls
the layers.
"""

import functools
import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from ..loss.linear_cross_entropy import linear_cross_entropy
from ..mlp.mlp import gelu_mlp
from ..mlp.swiglu_mlp import swiglu_mlp
from ..modules import LayerNorm
from ..norm.rms_norm import add_rms_norm, rms_norm
from ..plain import is_plain
from ._transformers_attention import NAME

# GELU by the class of the activation in transformers: the argument `approximate` of gelu_mlp.
GELUS = {
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "GELUActivation": "none",
}
SILUS = ("SiLUActivation", "SiLU")


def patched_class(original: type, forward: Callable) -> type:
    """Return the subclass of `original` with this forward(self, original, *args, **kwargs)."""
    patched = _CLASSES.get((original, forward))
    if patched is not None:
        return patched

    @functools.wraps(original.forward)  # Trainer reads the names of the arguments
    def run(self, *args, **kwargs):
        # accelerate keeps a bound copy of the forward, which may outlive unpatch.
        if not isinstance(self, patched):
            return original.forward(self, *args, **kwargs)
        return forward(self, original, *args, **kwargs)

    def __reduce_ex__(self, protocol):  # noqa: N807 - a method of the class below
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _empty, (original, forward), state

    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names}
    namespace |= {"forward": run, "__reduce_ex__": __reduce_ex__}
    namespace |= {"_tritium_original": original, "_tritium_arguments": _argument_names(original)}
    patched = type(original.__name__, (original,), namespace)
    _CLASSES[original, forward] = patched
    return patched


# Patched classes by original class and forward.
_CLASSES: dict[tuple[type, Callable], type] = {}


def original_class(module: nn.Module) -> type | None:
    """Return the class that a patched module had, or None for other modules."""
    if type(module) is LayerNorm:
        return nn.LayerNorm
    return vars(type(module)).get("_tritium_original")


def is_subclass_of_patched(module: nn.Module) -> bool:
    """Whether another library has derived the class of a module from a patched class."""
    is_patched = isinstance(module, LayerNorm) or hasattr(type(module), "_tritium_original")
    return is_patched and original_class(module) is None


def _empty(original: type, forward: Callable) -> nn.Module:
    """Make a patched module without state, for copy and pickle."""
    patched = patched_class(original, forward)
    return patched.__new__(patched)


# --- norms and MLPs


def rms_norm_forward(
    self, original: type, hidden_states: Tensor, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the norm; with `residual` the norm of the sum, and the sum."""
    eps = self.variance_epsilon
    if residual is None:
        return rms_norm(hidden_states, self.weight, eps=eps)
    return add_rms_norm(hidden_states, residual, self.weight, eps=eps)


def gpt2_mlp_forward(self, original: type, hidden_states: Tensor) -> Tensor:
    """Apply c_fc, GELU, c_proj and dropout."""
    c_fc, c_proj = self.c_fc, self.c_proj
    if not (is_plain(c_fc, Conv1D) and is_plain(c_proj, Conv1D)):
        return original.forward(self, hidden_states)
    y = gelu_mlp(
        hidden_states,
        c_fc.weight.t(),
        c_fc.bias,
        c_proj.weight.t(),
        c_proj.bias,
        approximate=GELUS[type(self.act).__name__],
    )
    return self.dropout(y)


def llama_mlp_forward(self, original: type, x: Tensor) -> Tensor:
    """Apply SwiGLU."""
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    if not all(is_plain(layer, nn.Linear) and layer.bias is None for layer in layers):
        return original.forward(self, x)
    return swiglu_mlp(x, *(layer.weight for layer in layers))


# --- blocks


def _argument_names(original: type) -> tuple[str, ...]:
    """Return the names of a forward's arguments, without self and the keyword dictionary."""
    parameters = inspect.signature(original.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def _named(self, args: tuple, kwargs: dict) -> dict:
    """Return all arguments of a forward by name."""
    return dict(zip(self._tritium_arguments, args, strict=False)) | kwargs


def gpt2_block_forward(self, original: type, *args, **kwargs) -> Tensor | tuple[Tensor]:
    """Run a block. The second norm also does the residual addition before it."""
    named = _named(self, args, kwargs)
    if named.get("encoder_hidden_states") is not None:
        raise NotImplementedError(
            "patch: GPT2Block: cross attention is not supported, got encoder_hidden_states; "
            "call unpatch"
        )
    if not is_plain(self.ln_2, LayerNorm):
        return original.forward(self, **named)
    stream = named.pop("hidden_states")
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        named.pop(name, None)
    branch = self.attn(self.ln_1(stream), **named)[0]
    y, stream = self.ln_2(branch, stream)
    stream = stream + self.mlp(y)
    # Blocks that have the argument output_attentions return a tuple: transformers before 5.4.
    return (stream,) if "output_attentions" in self._tritium_arguments else stream


def llama_block_forward(self, original: type, *args, **kwargs) -> Tensor:
    """Run a block. The second norm also does the residual addition before it."""
    named = _named(self, args, kwargs)
    norm = self.post_attention_layernorm
    if original_class(norm) is None or not is_plain(norm, type(norm)):
        return original.forward(self, **named)
    stream = named.pop("hidden_states")
    branch = self.self_attn(hidden_states=self.input_layernorm(stream), **named)[0]
    y, stream = norm(branch, stream)
    return stream + self.mlp(y)


# --- models


def model_forward(self, original: type, *args, **kwargs):
    """Check the arguments that attention cannot honour, then run the original forward."""
    if self.config._attn_implementation != NAME:  # the user has chosen another one since
        return original.forward(self, *args, **kwargs)
    named = _named(self, args, kwargs)
    attentions = named.get("output_attentions")
    if attentions is None:
        attentions = getattr(self.config, "output_attentions", False)
    if attentions:
        _raise_unsupported(original, "output_attentions=True", "attention weights never exist")
    for name in ("head_mask", "encoder_hidden_states"):
        if named.get(name) is not None:
            _raise_unsupported(original, name, "attention is causal self-attention of all heads")
    return original.forward(self, *args, **kwargs)


def _raise_unsupported(original: type, argument: str, reason: str) -> None:
    raise NotImplementedError(
        f"patch: {original.__name__}: {argument} is not supported, because {reason}; "
        "call model.set_attn_implementation('eager')"
    )


@can_return_tuple
def _loss_forward(self, original: type, output: type, labels: Tensor, named: dict):
    """Return the output of a head class with a loss and without logits."""
    logits_to_keep = named.pop("logits_to_keep", 0)
    ignore_index = named.pop("ignore_index", -100)
    targets = named.pop("shift_labels", None)
    num_items = named.pop("num_items_in_batch", None)
    if targets is None:
        # Token t predicts token t + 1, and the last token nothing.
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]

    # hidden states
    outputs = self.base_model(**named, return_dict=True)
    hidden = outputs.last_hidden_state
    if isinstance(logits_to_keep, int):
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    else:
        hidden = hidden[:, logits_to_keep]
    if targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"patch: {original.__name__}: labels must be {tuple(hidden.shape[:2])}, one for each "
            f"position of logits_to_keep, got {tuple(targets.shape)}; pass shift_labels"
        )

    # loss
    loss = linear_cross_entropy(
        hidden,
        self.lm_head.weight,
        targets.to(hidden.device),
        self.lm_head.bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items is None else "sum",
    )
    if num_items is not None:
        loss = loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)
    rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    return output(loss=loss, logits=None, **rest)


def gpt2_head_forward(self, original: type, *args, **kwargs):
    """Run the head of GPT-2."""
    return _head_forward(self, original, CausalLMOutputWithCrossAttentions, args, kwargs)


def llama_head_forward(self, original: type, *args, **kwargs):
    """Run the head of a Llama-like model."""
    return _head_forward(self, original, CausalLMOutputWithPast, args, kwargs)


def _head_forward(self, original: type, output: type, args: tuple, kwargs: dict):
    """Return a loss without logits in training, and run the original forward otherwise.

    skip_logits=False in kwargs asks for logits, and True for a loss without logits in evaluation.
    """
    named = _named(self, args, kwargs)
    labels = named.pop("labels", None)
    skip_logits = named.pop("skip_logits", None)
    if not (skip_logits is None or isinstance(skip_logits, bool)):
        raise ValueError(
            f"patch: {original.__name__}: skip_logits must be None, True or False, "
            f"got {skip_logits!r}"
        )
    skips = self.training if skip_logits is None else skip_logits
    if labels is None or not skips or not _computes_usual_loss(self, named):
        return original.forward(self, **named, labels=labels)
    return_dict = named.pop("return_dict", None)
    return _loss_forward(self, original, output, labels, named, return_dict=return_dict)


def _computes_usual_loss(self, named: dict) -> bool:
    """Whether nobody has replaced the loss or the head, and logits_to_keep is the usual one."""
    keeps = named.get("logits_to_keep", 0)
    return (
        _has_usual_loss(self)
        and is_plain(self.lm_head, nn.Linear)
        and (isinstance(keeps, int) or keeps.ndim == 1)
    )


def _has_usual_loss(self) -> bool:
    """Whether self.loss_function is ForCausalLMLoss.

    The property would log a warning for GPT-2, which torch.compile cannot trace.
    """
    if hasattr(self, "_loss_function"):  # the user has assigned one
        return self._loss_function is ForCausalLMLoss
    return LOSS_MAPPING.get(getattr(self, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss
