"""The options of a new run: a recipe, the changed options, and what follows from both."""

import math
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..config import TrainConfig
from ..data.prepare import is_dataset
from ..finetune.start import shape_for_run
from ..run.models import open_model, recorded_path


def new_config(base: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """Return the configuration of a new run.

    Args:
        base: the recipe.
        options: those that the user gives, by their flat names. They replace the recipe's.
    Raises: InputError if options do not fit together, or do not fit the dataset or the model to
        start from.
    """
    options = dict(options)
    micro_batch = base.execution.micro_batch_size
    batch_size = options.get("batch_size", 0)
    if isinstance(micro_batch, int) and batch_size > 0:
        # The recipe's micro-batch may not divide the batch.
        options.setdefault("micro_batch_size", math.gcd(micro_batch, batch_size))
    config = base.with_options(**options)
    if is_dataset(config.data):
        for option in ("held_out", "text_field"):
            if option in options:
                raise InputError(
                    f"{option}: expected none with {config.data[0]}, a dataset that is built; "
                    "leave it out, or build another dataset"
                )
        if "tokenizer" not in options:
            # A dataset has its own tokenizer. The recipe's tokenizer is for the recipe's data.
            config = replace(config, tokenizer=None)
    if config.init_from is not None:
        config = _start_from(config, options)
    return config


def _start_from(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """Give the run the shape and the tokenizer of the model that it starts from."""
    trained = open_model(Path(config.init_from))
    shape = shape_for_run(trained.config, config.model)
    for each in fields(shape):
        value, expected = getattr(config.model, each.name), getattr(trained.config, each.name)
        if each.name in given and value not in (expected, getattr(shape, each.name)):
            raise InputError(
                f"{each.name}: expected {expected}, as in {config.init_from}, got {value}; "
                "leave it out"
            )
    if config.tokenizer is not None and "tokenizer" not in given:
        if trained.tokenizer_path is None:
            raise InputError(
                f"tokenizer: expected the tokenizer of {config.init_from}, which has "
                f"{trained.config.vocab_size} tokens, got none; the model came without one"
            )
        config = replace(config, tokenizer=str(trained.tokenizer_path))
    return replace(config, model=shape, init_from=recorded_path(config.init_from))
