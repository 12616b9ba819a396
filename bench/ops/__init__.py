"""The operators that are measured: a module and a row for each."""

from collections.abc import Sequence

from ...train.storage.records import check_names
from . import cross_entropy, layer_norm, linear_cross_entropy, mlp, rms_norm
from .attention import ATTENTION
from .attention_decode import ATTENTION_DECODE
from .attention_packed import ATTENTION_NORM_ROPE
from .attention_varlen import ATTENTION_VARLEN
from .case import Operator
from .embedding import EMBEDDING
from .linear import LINEAR
from .rotary import ROTARY
from .swiglu import SWIGLU
from .swiglu_mlp import SWIGLU_MLP

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        layer_norm.LAYER_NORM,
        layer_norm.ADD_LAYER_NORM,
        layer_norm.ADD_LAYER_NORM_AFTER_BIAS,
        rms_norm.RMS_NORM,
        rms_norm.ADD_RMS_NORM,
        EMBEDDING,
        ROTARY,
        ATTENTION,
        ATTENTION_NORM_ROPE,
        ATTENTION_VARLEN,
        ATTENTION_DECODE,
        LINEAR,
        mlp.GELU_MLP,
        mlp.RELU2_MLP,
        SWIGLU,
        SWIGLU_MLP,
        cross_entropy.CROSS_ENTROPY,
        linear_cross_entropy.LINEAR_CROSS_ENTROPY,
    )
}


def choose(names: Sequence[str]) -> list[Operator]:
    """Return the operators with these names; all without names.

    Raises: InputError for an unknown name.
    """
    check_names("operator", names, OPERATORS)
    return [OPERATORS[name] for name in names or OPERATORS]
