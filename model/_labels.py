"""The class of a model and the labels of a classifier, in the config.json of transformers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

# Ends the names of transformers' classes of models that classify texts.
_SUFFIX = "ForSequenceClassification"


def labels_in(path: Path, fields: dict[str, Any]) -> tuple[str, ...]:
    """Return the labels of a classifier; () for a language model.

    Raises: InputError, which names `path`, if `architectures` is not a list, or if the labels are
        not numbered from 0.
    """
    architectures = fields.get("architectures")
    if not isinstance(architectures, list | None):
        raise InputError(
            f"{path}: architectures: expected a list of names, got {repr(architectures)[:60]}; "
            "get the file again"
        )
    architectures = architectures or [""]
    if not str(architectures[0]).endswith(_SUFFIX):
        return ()
    # transformers writes no labels if there are two without names.
    named = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        return tuple(str(named[str(number)]) for number in range(len(named)))
    except (TypeError, KeyError):
        raise InputError(
            f"{path}: id2label: expected a name for each number from 0, got {str(named)[:60]}"
        ) from None


def class_fields(architecture: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields that name the class of transformers, and the labels.

    Args:
        architecture: class of the language model, such as GPT2LMHeadModel.
        labels: what a classifier distinguishes. (): the model is a language model.
    """
    if not labels:
        return {"architectures": [architecture]}
    return {
        "architectures": [re.sub("LMHeadModel$|ForCausalLM$", _SUFFIX, architecture)],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
