"""The model with which a run starts: new weights, or those of a trained model."""

from pathlib import Path

import torch

from ...errors import InputError
from ...model import GPT, GPTConfig
from ...model.cost import parameters
from ...model.lora import add_lora, freeze
from ...model.prefix import add_prefix
from ..config import TrainConfig
from ..finetune.data import TaskData, model_options
from ..finetune.start import shape_for_run
from ..machine.memory import host_bytes
from ..run.models import open_model

# A published model can have this many rows in its vocabulary that no token uses: nanoGPT rounds
# the size of the vocabulary up to a multiple of 64, others to a multiple of 128.
_PADDING_TOKENS = 128


def initial_model(config: TrainConfig, data: TaskData) -> GPT:
    """Return a model with new weights, or the model to start from, in float32."""
    if config.init_from is None:
        return new_model(config, data, config.gpt(data.tokenizer.vocab_size))
    _check(config, data)
    torch.manual_seed(config.seed)
    model = open_model(Path(config.init_from)).load(**model_options(config)).float()
    if config.model.prefix_tokens:
        add_prefix(model, config.model.prefix_tokens)
    model.config = config.gpt(model.config.vocab_size)  # with the dropout of the run
    return _with_adapter(data.adapt(model, config), config).train()


def new_model(config: TrainConfig, data: TaskData, shape: GPTConfig) -> GPT:
    """Return a model of the run's task with new weights.

    Raises: InputError if the weights are larger than the memory of this machine.
    """
    _check_weights_fit(shape)
    torch.manual_seed(config.seed)
    return _with_adapter(data.new_model(config, shape), config)


def _check_weights_fit(shape: GPTConfig) -> None:
    """Raise InputError if this machine has too little memory to build the model.

    Without this check, very large layers raise an error of PyTorch that names no option, and very
    many layers take hours to build.
    """
    count = parameters(shape)
    memory_bytes = host_bytes()
    if memory_bytes is not None and 4 * count > memory_bytes:
        raise InputError(
            f"the model: expected weights that fit into the {memory_bytes / 1e9:,.0f} GB of memory "
            f"of this machine, got {count:,} parameters of 4 bytes each; give smaller sizes, such "
            "as `n_layer` or `d_model`"
        )


def _with_adapter(model: GPT, config: TrainConfig) -> GPT:
    """Give the model the LoRA of the run, or freeze all but its prefix, if there is any."""
    if config.model.prefix_tokens:
        freeze(model)
    if config.adapter.lora:
        torch.manual_seed(config.seed)
        add_lora(model, config.adapter)
    return model


def _check(config: TrainConfig, data: TaskData) -> None:
    """Raise InputError if the model to start from has another shape or another tokenizer."""
    trained = open_model(Path(config.init_from))
    found = config.gpt(trained.config.vocab_size)
    expected = shape_for_run(trained.config, found)
    if expected != found:
        raise InputError(f"init_from: expected a model of shape {found}, got {expected}")
    tokenizer = data.tokenizer
    if trained.tokenizer_path is not None:
        own = trained.tokenizer()
        if own.sha256 != tokenizer.sha256:
            raise InputError(
                f"tokenizer: expected {own.name} of {config.init_from}, got {tokenizer.name} with "
                "other tokens; leave `tokenizer` out"
            )
    elif not 0 <= expected.vocab_size - tokenizer.vocab_size < _PADDING_TOKENS:
        raise InputError(
            f"tokenizer: expected {expected.vocab_size} tokens, as in {config.init_from}, got "
            f"{tokenizer.vocab_size}; use the tokenizer of the model"
        )
