"""Write a trained model as a Hugging Face folder, or its adapter as a folder of PEFT."""

import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from ....errors import InputError, plural
from ....model.config import OPTIONS_OF_RUN
from ....model.cost import parameters
from ....model.folder import check_new_folder
from ....model.lora import base_sha256, save_adapter
from ....model.prefix import save_prefix
from ....model.weights import write_folder
from ...config import TrainConfig
from ...data.tokenizers.for_transformers import save_for_transformers
from ...data.tokenizers.published import PublishedTokenizer, files_in
from ...data.tokenizers.tokenizer import EXPORTED_TOKENIZER
from ...finetune.start import default_config
from ...recipes import recipe
from ...run.folder import read_run
from ...run.metrics import read_metrics
from ...run.models import SavedModel
from ...storage.files import check_can_create


def write_model(
    trained: SavedModel, out: Path, card: str, *, dtype: str = "auto", spec: str | None = None
) -> None:
    """Write a model, its tokenizer and its model card as a Hugging Face folder, or nothing.

    Args:
        out: must not exist, or be empty.
        card: content of README.md.
        dtype: of the weights. auto: as they are.
        spec: another tokenizer than the model's own, see `from_spec`.
    Raises: InputError if the folder is in use or cannot be created, or if transformers has no such
        model.
    """
    check_new_folder(out)
    check_can_create(out)
    if prefix := trained.config.prefix_tokens:
        raise InputError(
            f"{trained.path}: expected a model without a prefix, got {prefix} prefix tokens, which "
            "a Hugging Face folder cannot hold; add `adapter`"
        )
    # Copy the files in a Hugging Face folder as they are, even if tritium cannot read them.
    files = files_in(trained.path) if spec is None and trained.is_folder_of_transformers else {}
    has_tokenizer = spec is not None or trained.tokenizer_path is not None
    tokenizer = trained.tokenizer(spec) if has_tokenizer and not files else None
    if isinstance(tokenizer, PublishedTokenizer):
        files = tokenizer.files
    model = trained.load_any()
    if trained.note:
        print(trained.note)
    if dtype != "auto":
        model.to(getattr(torch, dtype))

    def add_files(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if tokenizer and not files:
            context = model.config.context_tokens
            save_for_transformers(tokenizer, folder, context, pads=bool(trained.labels))
            tokenizer.save(folder / EXPORTED_TOKENIZER)
        (folder / "README.md").write_bytes(card.encode("utf-8", "replace"))

    token_ids = (tokenizer.token_ids if tokenizer else {}) | trained.token_ids
    if trained.labels:
        # transformers reads the last token that is not padding.
        token_ids.setdefault("pad_token_id", token_ids.get("eos_token_id"))
    write_folder(
        out,
        model.state_dict(),
        model.config,
        token_ids=token_ids,
        labels=trained.labels,
        add_files=add_files,
    )


def write_adapter(trained: SavedModel, out: Path, *, dtype: str = "auto") -> None:
    """Write the LoRA or the prefix of a run as a folder of PEFT, or nothing.

    The folder names the model that the run started from. That model must stay where it is.

    Raises: InputError if the folder is in use or cannot be created, if the model has neither, or if
        transformers has no such model.
    """
    if dtype not in ("auto", "float32"):
        raise InputError(f"dtype: expected auto or float32 with `adapter`, got {dtype}")
    check_can_create(out)
    model = trained.load_with_adapter()
    base = str(Path(read_run(trained.run).train.init_from).resolve())
    if model.prefix is None:
        save_adapter(model, out, base=base)
    else:
        save_prefix(model, out, base=base, base_sha256=base_sha256(model))


def model_card(trained: SavedModel) -> str:
    """Return a README for the folder: what the model is, and how it was trained."""
    config = trained.config
    name = (trained.run or trained.path).resolve().name
    what = f"A classifier of {', '.join(trained.labels)}" if trained.labels else "A language model"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if trained.labels else 'text-generation'}",
        "---",
        "",
        f"# {name}",
        "",
        f"{what} with {parameters(config):,} parameters: {plural(config.n_layer, 'layer')}, width "
        f"{config.d_model}, {config.vocab_size:,} tokens, a context of "
        f"{config.context_tokens:,} tokens.",
        "",
    ]
    if trained.run is None:
        return "\n".join([*lines, f"Converted from {trained.path.name} by tritium.", ""])
    train = read_run(trained.run).train
    steps = int(trained.checkpoint.name.removeprefix("step-"))
    evaluations = [row for row in read_metrics(trained.run)[1] if row["step"] == steps]
    lines += [
        "Trained by tritium.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(train.data)} |",
        f"| tokenizer | {trained.tokenizer().name} |",
        f"| steps | {steps:,} of {train.steps:,} |",
        f"| tokens per step | {train.batch_size * config.context_tokens:,} |",
        f"| command | `{_command(train)}` |",
        *(
            f"| validation loss | {row['val_loss']:.4f} nats"
            f"{' per token' if 'val_perplexity' in row else ''} |"
            for row in evaluations
        ),
        *(
            f"| validation accuracy | {row['val_accuracy']:.4f} |"
            for row in evaluations
            if "val_accuracy" in row
        ),
        "",
    ]
    return "\n".join(lines)


def _command(config: TrainConfig) -> str:
    """Return a command that trains with the same options, whatever the recipe was."""
    if config.task == "pretrain":
        default = recipe("laptop").options()
        words = ["tritium", "train", "laptop"]
        hidden = ("out",)
    else:
        default = default_config(config.task).options()
        words = ["tritium", "finetune", config.task, config.init_from]
        # These follow from the model and from `epochs`, or from `steps`.
        length = "epochs" if config.task_options.epochs is None else "steps"
        shape = [name for name in asdict(config.model) if name not in OPTIONS_OF_RUN]
        hidden = ("out", "task", "init_from", "eval_interval", length, *shape)
    for name, value in config.options().items():
        if value == default[name] or name in hidden:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
