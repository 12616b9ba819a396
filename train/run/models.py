"""Open a trained model, wherever it comes from.

RUN                        a run: its newest checkpoint
RUN/checkpoints/step-N     one checkpoint
FOLDER                     a Hugging Face folder (GPT-2, Llama)
FILE.gguf                  a GGUF file (GPT-2, Llama)
FILE                       a checkpoint file of nanoGPT
ADAPTER                    a folder of PEFT with an adapter, which names its model

A run with LoRA and an adapter give a model whose weights include LoRA.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import InputError
from ...model import GPT, GPTClassifier, GPTConfig
from ...model.config import AdapterOptions
from ...model.cost import check_size
from ...model.hub import is_hub_name
from ...model.lora import (
    adapter_base,
    add_lora,
    base_sha256,
    is_adapter,
    merge_adapter,
    merge_lora,
)
from ...model.prefix import is_prefix, load_prefix, read_prefix
from ...model.weights import open_source
from ..data.tokenizers.published import has_tokenizer
from ..data.tokenizers.tokenizer import EXPORTED_TOKENIZER, Tokenizer, from_spec, needs_corpus
from ..generation.templates import TEMPLATES
from .checkpoint import load_weights, newest_checkpoint
from .folder import read_run


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model on the disk, and what is known about it."""

    path: Path
    config: GPTConfig
    tokenizer_path: Path | None
    """File or folder for Tokenizer.load. None: the model came without a tokenizer."""
    tokenizer_sha256: str | None = None
    """Hash that its own tokenizer must have. None: any."""
    run: Path | None = None
    """Folder of the run that trained it. None: the model is not from a run."""
    checkpoint: Path | None = None
    """Folder of the run's checkpoint."""
    note: str | None = None
    """A sentence about values that change when the weights are read."""
    template: str | None = None
    """Row of TEMPLATES with which a run was fine-tuned. None: the tokenizer's, or no template."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """The bos_token_id, eos_token_id and pad_token_id of a published model's configuration."""
    labels: tuple[str, ...] = ()
    """The labels of a classifier. (): a language model."""
    lora: AdapterOptions | None = None
    """LoRA of the run, whose checkpoint has its matrices. None: the run trained all weights."""
    adapter: Path | None = None
    """Folder with an adapter of PEFT, which changes the weights of the model."""

    @property
    def is_folder_of_transformers(self) -> bool:
        """Whether it is a folder that another program than tritium wrote."""
        is_own = (self.path / EXPORTED_TOKENIZER).is_file()
        return self.run is None and self.path.is_dir() and not is_own

    def load(self, *, attention: str = "tritium", recompute: str = "none") -> GPT:
        """Read the weights of a language model, and add LoRA to them.

        Returns: the model, on the CPU.
        Raises: InputError if the model is a classifier.
        """
        if self.labels:
            raise InputError(
                f"{self.path}: expected a language model, got a classifier of "
                f"{', '.join(self.labels)[:100]}; `tritium classify` uses it"
            )
        model = self._load(attention=attention, recompute=recompute)
        if self.lora is not None:
            merge_lora(model)
        if self.adapter is not None:
            model.float()
            if is_prefix(self.adapter):
                load_prefix(model, self.adapter, base_sha256(model))
            else:
                merge_adapter(model, self.adapter)
        return model

    def load_classifier(self) -> GPTClassifier:
        """Read the weights of a classifier, and add LoRA to them. Returns: the model, on the CPU.

        Raises: InputError if the model is a language model.
        """
        if not self.labels:
            raise InputError(
                f"{self.path}: expected a model that classifies texts, got a language model; "
                "`tritium finetune classify` makes one"
            )
        model = self._load()
        if self.lora is not None:
            merge_lora(model)
        return model

    def load_any(self) -> GPT:
        """Read the weights. Returns: a GPT or a GPTClassifier, on the CPU."""
        return self.load_classifier() if self.labels else self.load()

    def load_with_adapter(self) -> GPT:
        """Read the weights of a run, with LoRA or a prefix apart from them.

        Raises: InputError if the run trained neither, or if the model is a classifier.
        """
        has_prefix = self.run is not None and self.config.prefix_tokens > 0
        if self.adapter is not None:
            raise InputError(f"{self.adapter}: expected a run, got an adapter; copy the folder")
        if self.lora is None and not has_prefix:
            raise InputError(
                f"{self.path}: expected a run that trained LoRA or a prefix, got another model; "
                "export the model itself"
            )
        if self.labels:
            raise InputError(
                f"{self.path}: expected a language model, got a classifier, whose head is not part "
                "of an adapter; export the model itself"
            )
        return self._load()

    def _load(self, **options: str) -> GPT:
        if self.checkpoint is None:
            kind = GPTClassifier if self.labels else GPT
            return kind.from_pretrained(self.path, **options)
        check_size(self.checkpoint, self.config, bytes_per_parameter=4)
        # The prefix of an adapter is not in the checkpoint of its model.
        config = self.config if self.adapter is None else self.config.with_prefix(0)
        if self.labels:
            model = GPTClassifier(config, self.labels, **options)
        else:
            model = GPT(config, **options)
        if self.lora is not None:
            add_lora(model, self.lora)
        load_weights(self.checkpoint, model)
        return model

    def tokenizer(self, spec: str | None = None) -> Tokenizer:
        """Read the tokenizer.

        Args: spec: another tokenizer than the model's own, as `from_spec` takes it.
        Raises: InputError if there is none, if it has more tokens than the model, or other tokens
            than the run was trained with.
        """
        if spec is None and self.tokenizer_path is None:
            raise InputError(
                f"{self.path}: expected a model with a tokenizer, found none; name it with "
                "`tokenizer`"
            )
        if spec is not None and needs_corpus(spec):
            raise InputError(
                f"tokenizer: expected a tokenizer that needs no corpus, got {spec}; name the "
                "tokenizer.json of a run"
            )
        found = Tokenizer.load(self.tokenizer_path) if spec is None else from_spec(spec, list)
        if spec is None and self.tokenizer_sha256 not in (None, found.sha256):
            raise InputError(
                f"{self.tokenizer_path}: expected tokenizer {self.tokenizer_sha256[:12]}, with "
                f"which the model was trained, got {found.sha256[:12]}; copy the tokenizer.json of "
                "its dataset, or name that file with `tokenizer`"
            )
        if found.vocab_size > self.config.vocab_size:
            raise InputError(
                f"tokenizer: expected at most {self.config.vocab_size} tokens, as {self.path} has, "
                f"got {found.vocab_size} of {found.name}"
            )
        if spec is not None and self.run is not None:
            self._check_tokens(found)
        return found

    def _check_tokens(self, given: Tokenizer) -> None:
        """Raise InputError if the tokenizer of the run can be read and has other tokens."""
        try:
            own = Tokenizer.load(self.tokenizer_path)
        except (InputError, OSError):
            return  # the given one replaces it
        is_of_run = self.tokenizer_sha256 in (None, own.sha256)
        if is_of_run and own.pieces != given.pieces:
            raise InputError(
                f"tokenizer: expected the {own.vocab_size} tokens of {own.name}, with which "
                f"{self.run} was trained, got the {given.vocab_size} of {given.name}; leave "
                "`tokenizer` out"
            )


def recorded_path(model: str | Path) -> str:
    """Return a model's path for config.json: absolute, because an exported adapter names it."""
    return str(Path(model).absolute())


def open_model(path: Path) -> SavedModel:
    """Find a trained model. Its weights are not read yet.

    Raises: InputError if there is no model at `path`.
    """
    if is_adapter(path):
        return _with_adapter(open_model(adapter_base(path)), path)
    is_checkpoint = path.parent.name == "checkpoints" and (path / "state.json").exists()
    run = path.parent.parent if is_checkpoint else path
    if not is_checkpoint and not (path / "checkpoints").is_dir() and is_published(path):
        source = open_source(path)
        is_with_tokenizer = (
            source.has_tokenizer
            or (path / EXPORTED_TOKENIZER).is_file()
            or (path.is_dir() and has_tokenizer(path))
        )
        return SavedModel(
            path=path,
            config=source.config,
            tokenizer_path=path if is_with_tokenizer else None,
            token_ids=source.token_ids,
            labels=source.labels,
            note=source.note,
        )
    if not is_checkpoint and not _is_run(path):
        found = "found none"
        if (path / "config.json").is_file():
            found = "got a folder whose config.json is of another program, or damaged; get it again"
        elif is_hub_name(str(path)):
            found += "; `tritium import` downloads it"
        raise InputError(
            f"{path}: expected a run, a checkpoint, a Hugging Face folder, a GGUF file, a "
            f"checkpoint of nanoGPT or an adapter of PEFT, {found}"
        )
    record = read_run(run)
    template = getattr(record.train.task_options, "template", None)
    return SavedModel(
        template=template if template in TEMPLATES else None,
        path=path,
        config=record.model,
        labels=tuple(record.labels),
        tokenizer_sha256=record.tokenizer_sha256,
        tokenizer_path=run / "tokenizer.json",
        run=run,
        checkpoint=path if is_checkpoint else newest_checkpoint(run),
        lora=record.train.adapter if record.train.adapter.lora else None,
    )


def _with_adapter(base: SavedModel, folder: Path) -> SavedModel:
    config = base.config
    if is_prefix(folder):
        values, _ = read_prefix(folder)
        config = config.with_prefix(min(len(values), config.context_tokens - 1))
    return replace(base, adapter=folder, config=config)


def is_published(path: Path) -> bool:
    """Whether the path is a file, or a folder whose config.json names a model of transformers."""
    return path.is_file() or b'"model_type"' in _config_of(path)


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or b'"tritium"' in _config_of(path)


def _config_of(path: Path) -> bytes:
    config = path / "config.json"
    return config.read_bytes() if config.is_file() else b""
