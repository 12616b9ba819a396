"""Read and write models as folders that transformers opens. _families.py has the families.

    config.json                       the shape
    model.safetensors                 the weights, in one file, or in
    model-00001-of-00003.safetensors  several, with model.safetensors.index.json
    pytorch_model.bin                 the same by torch.save; read, never written

Values are never rounded: a model that is read and written again has the same bits. One weight is
read at a time, so memory holds the model once.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ._families import FAMILIES, Family, Fields, family_of
from ._gguf import read_gguf
from ._labels import class_fields, labels_in
from .config import GPTConfig
from .cost import check_size
from .folder import new_folder, write_json
from .safetensors_file import DTYPES, write_safetensors

if TYPE_CHECKING:
    from .gpt import GPT

_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
MAX_SHARD_BYTES = 5_000_000_000
_HEAD = "lm_head.weight"
_HEADS = (_HEAD, "score.weight")  # named without a prefix in all families
_TABLES = ("wte.weight", _HEAD)  # they have padding rows
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# torch.compile adds this to the names of a model that it compiled.
_NANOGPT_PREFIX = "_orig_mod."


# --- where a published model's weights are


class Source:
    """The weights of a published model, read one at a time.

    Attributes:
        family: the row of FAMILIES.
        config: the shape of the model.
        token_ids: the ids of special tokens in its configuration, such as eos_token_id.
        labels: what a classifier distinguishes; () for a language model.
        note: a sentence about values that change when they are read. None: no value changes.
        has_tokenizer: whether the file of the weights also has a tokenizer.
    """

    note: str | None = None
    has_tokenizer: bool = False

    def __init__(self, path: Path, family: Family, fields: Fields, read: dict[str, Callable]):
        self.path = path
        self.family = family
        try:
            _check_required(fields, family)
            self.config = family.read_config(fields)
        except KeyError as error:
            raise InputError(f"{path}: expected the field {error} in its configuration") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            # Without backticks, which would make it a flag: no command changes the configuration.
            reason = str(error).removeprefix("GPTConfig: ").replace("`", "")
            raise InputError(
                f"{path}: expected the configuration of a model, got something else ({reason})"
            ) from None
        named = {name: fields.get(name) for name in _TOKEN_IDS}
        self.token_ids = {name: value for name, value in named.items() if value is not None}
        self.labels = labels_in(path, fields)
        self._dtypes: dict[torch.dtype, str] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for name, function in read.items():
            short = name.removeprefix(family.prefix)
            if not family.dropped.match(short):
                self._read[short] = function

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return our parameter `name`, and forget its names in the file.

        Raises: InputError if a tensor is missing or has another shape.
        """
        parts = []
        for theirs in self.family.names(name):
            if theirs not in self._read:
                raise InputError(f"{self.path}: expected a tensor {theirs}, found none")
            parts.append(self._checked(theirs, self._read.pop(theirs)(), len(shape)))
        is_transposed = self.family.transposed and self.family.transposed.search(name)
        if is_transposed:
            parts = [part.t() for part in parts]
        rows = sum(len(part) for part in parts)
        if (rows, *parts[0].shape[1:]) != tuple(shape) or len({x.shape[1:] for x in parts}) > 1:
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            raise InputError(
                f"{self.path}: expected {name} of shape {tuple(shape)} from its configuration, "
                f"got {found}"
            )
        # A copy, because the tensors of a file are views of the mapped file.
        if len(parts) > 1:
            return torch.cat(parts)
        return parts[0].clone(memory_format=torch.contiguous_format)

    def _checked(self, name: str, value: object, ndim: int) -> Tensor:
        """Raise InputError unless `value` is a tensor of floats with `ndim` axes."""
        is_float = isinstance(value, Tensor) and value.dtype in DTYPES
        if not is_float or value.ndim != ndim:
            found = type(value).__name__
            if isinstance(value, Tensor):
                found = f"{value.dtype} {tuple(value.shape)}"
            axes = "1 axis" if ndim == 1 else f"{ndim} axes"
            raise InputError(
                f"{self.path}: expected {name} to have {axes} of float32, bfloat16 or float16, "
                f"got {found}"
            )
        self._dtypes.setdefault(value.dtype, name)
        if len(self._dtypes) > 1:
            names = " and ".join(f"{name} {dtype}" for dtype, name in self._dtypes.items())
            raise InputError(f"{self.path}: expected tensors of one dtype, got {names}")
        return value

    def check_end(self, embedding: Tensor) -> None:
        """Raise InputError if the file has tensors that are not in the model.

        Args:
            embedding: (vocab_size, D). Some files hold it a second time, as the head's weight.
        """
        head = self._read.pop(_HEAD, None)
        if head is not None and not torch.equal(head(), embedding):
            raise InputError(
                f"{self.path}: expected a head that shares the weight of the embedding, got "
                "another weight; if it is right, set tie_word_embeddings to false in config.json"
            )
        extra = sorted(self._read)
        if extra:
            raise InputError(
                f"{self.path}: expected only tensors of the model, got {', '.join(extra[:3])}"
                f"{' ...' if len(extra) > 3 else ''}"
            )


def open_source(path: Path) -> Source:
    """Open a Hugging Face folder, a GGUF file, or the checkpoint file of nanoGPT.

    Raises: InputError if it is none of them, if the architecture is not supported, or if the files
        are too small for the model.
    """
    source = _open(path)
    check_size(path, source.config)
    return source


def _open(path: Path) -> Source:
    if path.is_file() and path.suffix == ".gguf":
        name, fields, read, note = read_gguf(path)
        source = Source(path, FAMILIES[name], fields, read)
        source.note = note
        source.has_tokenizer = fields["has_tokenizer"]
        return source
    if path.is_file():
        return _open_nanogpt(path)
    file = path / "config.json"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a folder with config.json, a GGUF file or a file of nanoGPT"
        )
    try:
        fields = json.loads(file.read_bytes())
        model_type = fields["model_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{file}: expected the configuration of a model of transformers") from None
    row = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if row is None or row.architecture is None:
        known = ", ".join(name for name, row in FAMILIES.items() if row.architecture)
        raise InputError(f"{file}: expected model_type {known}, got {model_type!r}")
    return Source(path, row, fields, _open_files(path))


def _check_required(fields: Fields, family: Family) -> None:
    for name, value in family.required.items():
        if fields.get(name, value) != value:
            raise InputError(f"{name}: expected {value!r}, got {fields[name]!r}; not supported")


def _open_files(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Return a function per tensor that reads it."""
    for name, open_file in ((_SAFETENSORS, _open_safetensors), (_BIN, _open_bin)):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = {
                    str(file) for file in json.loads(index.read_bytes())["weight_map"].values()
                }
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise InputError(f"{index}: expected a weight_map of tensors and files") from None
            read = {}
            for file in sorted(files):
                if Path(file).name != file or not (folder / file).is_file():
                    raise InputError(f"{index}: expected the file {file} next to it, found none")
                read |= open_file(folder / file)
            return read
        if (folder / name).is_file():
            return open_file(folder / name)
    raise InputError(f"{folder}: expected {_SAFETENSORS} or {_BIN}, whole or in shards, found none")


def _open_safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    def read(name: str) -> Tensor:
        # Opened for each tensor: closing the file drops from memory the pages that were read.
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged, or not safetensors ({error}); get it again") from None
    return {name: lambda name=name: read(name) for name in names}


def _open_bin(file: Path) -> dict[str, Callable[[], Tensor]]:
    tensors = _load_pickle(file)
    if not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{file}: expected tensors by name, got something else")
    return {name: lambda value=value: value for name, value in tensors.items()}


def _load_pickle(file: Path, expected: str = "a file of torch.save") -> dict:
    """Read what torch.save wrote. It may hold tensors and plain values, and no code."""
    try:
        with warnings.catch_warnings():
            # torch.load warns about some files before it raises for them.
            warnings.simplefilter("ignore")
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a format without mmap, of PyTorch before 1.6
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        raise InputError(
            f"{file}: expected {expected} with tensors only, whole and undamaged, got a file that "
            f"torch.load cannot read ({type(error).__name__})"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected tensors by name, got {type(content).__name__}")
    return content


def _open_nanogpt(file: Path) -> Source:
    content = _load_pickle(file, "a GGUF file, or a checkpoint of nanoGPT")
    try:
        fields, tensors = content["model_args"], content["model"]
        read = {
            name.removeprefix(_NANOGPT_PREFIX): lambda value=value: value
            for name, value in tensors.items()
        }
        fields = dict(fields)
    except (KeyError, AttributeError, TypeError, ValueError):
        raise InputError(f"{file}: expected a checkpoint of nanoGPT, got something else") from None
    return Source(file, FAMILIES["nanogpt"], fields, read)


# --- into a model


def load_into(model: "GPT", source: Source) -> None:
    """Replace the parameters of a model on the meta device by those of a file."""
    config = model.config
    embedding = None
    for name, parameter in dict(model.named_parameters()).items():
        shape = list(parameter.shape)
        if name in _TABLES:
            shape[0] = config.vocab_size
        value = source.take(name, shape)
        if name in _TABLES:
            padding = value.new_zeros(config.padded_vocab_size - config.vocab_size, shape[1])
            value = torch.cat((value, padding))
        if name == "wte.weight":
            embedding = value[: config.vocab_size]
        model.load_state_dict({name: value}, strict=False, assign=True)
    source.check_end(embedding)


# --- out of a model


def tensors_of(
    weights: dict[str, Tensor], config: GPTConfig, family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model as a family names and stores them."""
    for name, value in weights.items():
        if name in _TABLES:
            value = value[: config.vocab_size]
        if family.transposed and family.transposed.search(name):
            value = value.t()
        theirs = family.names(name)
        parts = [value]
        if len(theirs) > 1:
            parts = value.split(config.qkv_rows)
        for part_name, part in zip(theirs, parts, strict=True):
            prefix = "" if name in _HEADS else family.prefix
            yield prefix + part_name, part.detach()


def write_folder(
    folder: Path,
    weights: dict[str, Tensor],
    config: GPTConfig,
    *,
    token_ids: Fields | None = None,
    labels: Sequence[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model as a Hugging Face folder: the whole folder or nothing.

    Args:
        folder: must not exist, or be empty.
        weights: by our parameter names.
        config: the shape.
        token_ids: bos_token_id, eos_token_id and others that generation needs.
        labels: what a classifier distinguishes. Default: the model is a language model.
        max_shard_bytes: largest size of a file of weights.
        add_files: writes more files into the folder that it is called with.
    Raises: InputError if the folder is in use, or if transformers has no such model.
    """
    name = family_of(config)
    family = FAMILIES[name]
    with new_folder(folder) as temporary:
        dtype = _write_weights(temporary, tensors_of(weights, config, family), max_shard_bytes)
        tokens = token_ids or {}
        fields = {
            "model_type": name,
            **class_fields(family.architecture, labels),
            **family.write_config(config),
            **tokens,
            "dtype": dtype,
            "torch_dtype": dtype,  # the name before transformers 5
            "use_cache": True,
        }
        write_json(temporary / "config.json", fields)
        write_json(temporary / "generation_config.json", tokens)
        add_files(temporary)


def _write_weights(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int
) -> str:
    """Write the files of weights. Returns: the dtype of the tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors:
        if shards[-1] and size + value.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    files = [_SAFETENSORS]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        total = sum(value.nbytes for shard in shards for value in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{_SAFETENSORS}.index.json", index)
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    return str(next(iter(shards[0].values())).dtype).removeprefix("torch.")
