"""Tokenizers of published models: the files in a Hugging Face folder.

    tokenizer.json             vocabulary, merges, how text is split, added tokens
    tokenizer_config.json      special tokens by their roles (eos_token ...), the chat template
    special_tokens_map.json    special tokens by their roles, in older folders
    chat_template.jinja        the chat template, in newer folders
    generation_config.json     more ids that end an answer

The package tokenizers turns text into ids, and transformers renders chat templates in a sandbox.
Both are in the extra `hf`. transformers also writes tokenizer.json for a folder that has another
format (vocab.json with merges.txt, tokenizer.model) and for a GGUF file. It writes the special
tokens of a folder that does not name its eos_token, such as GPT-2's: it knows them by the type of
the model. A run keeps all these files in its own tokenizer.json, and `tritium export` writes them
again without a change.

An id stands for fixed bytes, as with tritium's own tokenizers. So the bytes of several ids can be
joined. Llama's tokenizer puts a space before a text. The decoded text keeps it, and names of
special tokens. `decode_answer` leaves both out, as transformers does.
"""

import base64
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import InputError
from ._definition import can_cut, undefined_tokens
from ._token_bytes import pieces_of
from .tokenizer import Tokenizer, hash_parts, without_surrogates

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def read_published(path: Path) -> "PublishedTokenizer":
    """Read the tokenizer in a Hugging Face folder, or in a GGUF file.

    Raises: InputError if there is none, if it is damaged or not supported, or if a package of the
        extra `hf` is not installed.
    """
    files = files_in(path) if path.is_dir() else {}
    try:
        if path.is_dir() and not has_tokenizer(path):
            raise InputError("expected a folder with tokenizer.json, found none")
        own = files.get("tokenizer.json")
        if own is None or "eos_token" not in _special_tokens_in(files):
            files |= _convert(path)
        if own is not None:  # transformers may add tokens that the model does not have
            files["tokenizer.json"] = own
        return PublishedTokenizer(
            path.resolve().stem if path.is_file() else path.resolve().name, files
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return any((folder / name).is_file() for name in names)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of the tokenizer's files in a folder, by their names."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _convert(path: Path) -> dict[str, bytes]:
    """Let transformers write tokenizer.json and tokenizer_config.json."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(_needs("transformers")) from None
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)
        with tempfile.TemporaryDirectory() as temporary:
            found.save_pretrained(temporary)
            return files_in(Path(temporary))
    except Exception as error:  # transformers raises many types for damaged files
        reason = str(error).strip().splitlines()
        raise InputError(
            "expected a tokenizer that transformers opens, got "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from None


class PublishedTokenizer(Tokenizer):
    """The tokenizer of a published model.

    Args:
        name: of the model.
        files: content of the files that the top of this file lists, by their names.
    Attributes: those of Tokenizer, and
        files: the argument `files`.
        special_tokens: names of special tokens by their roles, such as {"eos_token": "</s>"}.
    Raises: InputError if a file is damaged or missing, or if the tokenizer cannot give bytes.
    """

    def __init__(self, name: str, files: dict[str, bytes]):
        self.files = dict(files)
        self._definition = _read_json(files, "tokenizer.json")
        for part in ("truncation", "padding", "version"):  # they change no id
            self._definition.pop(part, None)
        self._plain = _backend(self._definition)
        # Names of special tokens in a text are encoded like other text.
        self._plain.encode_special_tokens = True

        ids = self._plain.get_vocab(with_added_tokens=True)
        settings = _read_json(files, "tokenizer_config.json")
        self.special_tokens = _special_tokens_in(files)
        end = self.special_tokens.get("eos_token")
        if end not in ids:
            raise InputError(
                "expected an eos_token in tokenizer_config.json that is in the vocabulary, "
                f"got {end!r}"
            )
        self._ids = ids
        super().__init__("published", name, pieces_of(self._definition, ids))

        self.end_of_text = ids[end]
        self.start_tokens = self._find_start_tokens(settings.get("add_bos_token"))
        self.stop_tokens = tuple(dict.fromkeys([self.end_of_text, *_more_stop_tokens(files)]))
        self.can_cut = can_cut(self._definition, self._plain)
        self.chat_template = _chat_template(settings, files)

    def _definition_sha256(self) -> str:
        definition = json.dumps(self._definition, sort_keys=True)
        end = self.special_tokens["eos_token"]
        return hash_parts(b"published", definition.encode(), end.encode())

    def _make_encoder(self) -> Callable[[str], np.ndarray]:
        return lambda text: _encode(self._plain, text)

    def _find_start_tokens(self, add_bos: bool | None) -> Sequence[int]:
        """Return the ids that the folder puts before a text."""
        if isinstance(add_bos, bool):
            start = self.special_tokens.get("bos_token") if add_bos else None
            if start is not None and start not in self._ids:
                raise InputError(
                    "expected a bos_token in tokenizer_config.json that is in the vocabulary, got "
                    f"{start!r}; get the file again"
                )
            return () if start is None else (self._ids[start],)
        with _as_input_errors():
            found = self._plain.encode("a")
        text = found.special_tokens_mask.index(0) if 0 in found.special_tokens_mask else 0
        return tuple(found.ids[:text])

    @functools.cached_property
    def _with_special(self):
        return _backend(self._definition)

    @property
    def token_ids(self) -> dict[str, int]:
        """Ids of special tokens as a config.json names them, such as {"eos_token_id": 2}."""
        roles = ("bos_token", "eos_token", "pad_token")
        names = {f"{role}_id": self.special_tokens.get(role) for role in roles}
        return {role: self._ids[name] for role, name in names.items() if name in self._ids}

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text, as `encode` does.

        With more than one thread, the package tokenizers uses all cores.
        """
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        clean = [without_surrogates(text) for text in texts]
        with _as_input_errors():
            found = self._plain.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(each.ids, dtype=self.dtype) for each in found]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Join the bytes of `ids`, as Tokenizer.decode_bytes does.

        A model can have more rows than its tokenizer has tokens. Ids without a token decode to no
        bytes.
        """
        ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int64)
        return super().decode_bytes(ids[ids < self.vocab_size])

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Convert the ids of an answer to text as transformers does: without special tokens.

        The space that Llama's tokenizer puts before a text is left out too.
        """
        # transformers also skips a token that only tokenizer_config.json calls special.
        special = {self._ids.get(name) for name in self.special_tokens.values()}
        kept = [number for number in map(int, ids) if number not in special]
        return self._with_special.decode(kept, skip_special_tokens=True)

    def encode_rendered(self, text: str) -> np.ndarray:
        """Convert text to ids. The names of special tokens become their ids."""
        found = _encode(self._with_special, without_surrogates(text))
        return found.astype(self.dtype, copy=False)

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Turn messages into text by the chat template. See Tokenizer.render_chat."""
        if self.chat_template is None:
            return super().render_chat(messages)
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise InputError(f"chat: {_needs('transformers')}") from None
        try:
            rendered, _ = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template can raise any error
            raise InputError(
                f"chat: the chat template of {self.name} raised {type(error).__name__}: {error}"
            ) from None
        return rendered[0]

    def _content(self) -> dict:
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return {"files": files, "files_sha256": _hash_files(self.files)}


# --- the files


def unpack_files(content: dict[str, Any]) -> dict[str, bytes]:
    """Return the files in a tokenizer.json of tritium. Raises: ValueError if one was changed."""
    files = {name: base64.b64decode(text) for name, text in content["files"].items()}
    # Older files have no hash.
    if content.get("files_sha256") not in (None, _hash_files(files)):
        raise ValueError("a file in it does not match its checksum")
    return files


def _hash_files(files: dict[str, bytes]) -> str:
    return hash_parts(*(part for name in sorted(files) for part in (name.encode(), files[name])))


def _read_json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """Return the content of a file of JSON; {} without the file."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{name}: expected a JSON object, got something else; get it again")
    return content


def _special_tokens_in(files: dict[str, bytes]) -> dict[str, str]:
    """Return the names of special tokens by their roles. The first file with a role wins."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    settings = [_read_json(files, name) for name in names]
    found = {}
    for role in _ROLES:
        for each in settings:
            token = each.get(role)
            # A token is its name, or an object with its name and how it is matched.
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(role, token)
    return found


def _chat_template(settings: dict[str, Any], files: dict[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):  # templates by name
        if not all(isinstance(each, dict) for each in template):
            raise InputError(
                "tokenizer_config.json: expected objects with name and template in chat_template, "
                "got something else; get the file again"
            )
        named = [each.get("template") for each in template if each.get("name") == "default"]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def _more_stop_tokens(files: dict[str, bytes]) -> list[int]:
    """Return the ids in generation_config.json that end an answer."""
    found = _read_json(files, "generation_config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise InputError(
            f"generation_config.json: expected an id or a list of ids as eos_token_id, got "
            f"{str(found)[:60]}; get the file again"
        )
    return ids


def _needs(package: str) -> str:
    return f"expected the package {package}, found none; pip install 'tritium[hf]'"


# --- the definition: the content of tokenizer.json


def _backend(definition: dict[str, Any]):
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise InputError(f"tokenizer: {_needs('tokenizers')}") from None
    try:
        backend = Backend.from_str(json.dumps(definition))
    except Exception as error:  # the package raises Exception itself
        raise InputError(
            f"tokenizer.json: expected a file of the package tokenizers, got something else "
            f"({error})"
        ) from None
    undefined = undefined_tokens(definition)
    if undefined:
        # While it encodes, the package would panic and write more lines to stderr.
        raise InputError(
            "tokenizer.json: expected a definition of each special token of post_processor, got "
            f"none for {', '.join(undefined)}; get the file again"
        )
    return backend


@contextlib.contextmanager
def _as_input_errors() -> Iterator[None]:
    """Turn errors of the package into InputError: its definition cannot encode a text."""
    try:
        yield
    except BaseException as error:
        # The package raises Exception, or PanicException, a BaseException, if its Rust code panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"tokenizer.json: expected a definition that encodes every text, got the error "
            f"{str(error)!r}; get the file again"
        ) from None


def _encode(backend, text: str) -> np.ndarray:
    with _as_input_errors():
        return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
