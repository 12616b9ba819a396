"""Tokenizers: text to token ids and back, made from a one-word spec.

    bytes          256 bytes, then end-of-text
    chars          the sorted characters of the corpus, then end-of-text
    gpt2           OpenAI's 50,257 tokens (tiktoken downloads them once)
    FILE.tiktoken  ranks in tiktoken's file format, with GPT-2's split pattern, then end-of-text
    FILE.json      the tokenizer.json of a run or a dataset
    FOLDER         the tokenizer of a published model (published.py), or of an export
    bpe:4096       byte pairs learned from the corpus; 4,096 ids, the last is end-of-text

A tokenizer is a list of byte strings, its pieces. The id of a piece is its index in the list. In
tritium's own tokenizers the last piece is end-of-text; a published tokenizer names its id. A
byte-pair tokenizer also has the pattern that splits text before pairs are merged. `sha256` covers
this definition and `tokenizer.json` stores it. `<|endoftext|>` in a text is encoded like any other
text. Only data/build.py inserts the end-of-text id, between documents.

rustbpe learns byte pairs and tiktoken applies them. rustbpe gives tiktoken's ranks directly, its
wheel is 1.1 MB and runs on Python 3.10 to 3.13, and it learns the same vocabulary on any number of
threads. Hugging Face tokenizers can learn too, but only in its own pipeline format. Measured on 2
cores of an AMD EPYC, November 2026, with 12 MB of Python and 4,096 tokens: learning takes 1.0 s
(Hugging Face 1.3 s), and encoding runs at 16 MB/s (Hugging Face 5.4 MB/s with the same pattern).
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ....errors import InputError, did_you_mean
from ...storage.files import write_whole
from ...storage.records import read_object
from ..shards import token_dtype
from ._encoders import bpe_encoder, chars_encoder, encode_bytes
from ._vocabularies import (
    GPT2_PATTERN,
    LEARNED_PATTERN,
    check_pieces,
    download_gpt2,
    learn_bpe,
    learn_chars,
    read_ranks,
    single_bytes,
)

END_OF_TEXT = "<|endoftext|>"
DEFAULT_TOKENIZER = "bpe:4096"
FORMAT_VERSION = 1

# Places where text may be cut without changing its ids: after a single line end that is followed by
# text, and before a single space between two letters. Both patterns always end a piece there.
SAFE_CUT = re.compile(r"\S\n(?=\S)|[A-Za-z](?= [A-Za-z])")
_SMALLEST_BPE = 258  # 256 bytes, one merge, end-of-text
_FORMAT = "tritium tokenizer"
_KINDS = ("bytes", "chars", "bpe")
_SPECS = "bytes, chars, gpt2, FILE.tiktoken, FILE.json, FOLDER or bpe:SIZE"
# The tokenizer in a folder that `tritium export` wrote. tokenizer.json is transformers' there.
EXPORTED_TOKENIZER = "tritium_tokenizer.json"


class Tokenizer:
    """Encode text to ids and decode ids to text. Made by `from_spec` or `Tokenizer.load`.

    Attributes:
        kind: "bytes", "chars", "bpe" or "published".
        name: the spec without folders. It is shown to users and is not part of `sha256`.
        pieces: the bytes of each id. Ids are in [0, vocab_size).
        pattern: the split pattern of a "bpe" tokenizer, otherwise "".
        vocab_size: number of ids, end-of-text included.
        end_of_text: id of the token between documents.
        start_tokens: ids that the model expects before a text. Only published tokenizers have them.
        stop_tokens: ids that end an answer. The first is end_of_text.
        chat_template: the Jinja template that turns messages into text. None: there is none.
        can_cut: whether `cut` gives parts that can be encoded separately.
        dtype: of ids, see `token_dtype`.
        sha256: 64 hex digits, the hash of the definition. Tokenizers with equal hashes give equal
            ids for every text.
    """

    start_tokens: Sequence[int] = ()
    chat_template: str | None = None
    can_cut: bool = True

    def __init__(self, kind: str, name: str, pieces: Sequence[bytes], pattern: str = ""):
        self.kind = kind
        self.name = name
        self.pieces = list(pieces)
        self.pattern = pattern
        self.vocab_size = len(self.pieces)
        self.end_of_text = self.vocab_size - 1
        self.stop_tokens: Sequence[int] = (self.end_of_text,)
        self.dtype = token_dtype(self.vocab_size)
        self.sha256 = self._definition_sha256()
        self._encode = self._make_encoder()

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.vocab_size} tokens, {self.sha256[:12]})"

    def _definition_sha256(self) -> str:
        return hash_parts(self.kind.encode(), self.pattern.encode(), *self.pieces)

    def _make_encoder(self) -> Callable[[str], np.ndarray]:
        """Return a function from text without lone surrogates to ids of any unsigned dtype."""
        if self.kind == "bytes":
            return encode_bytes
        if self.kind == "chars":
            return chars_encoder(self.pieces[:-1])
        return bpe_encoder(self.pieces[:-1], self.pattern)

    def encode(self, text: str) -> np.ndarray:
        """Convert text to ids.

        A lone surrogate is encoded as U+FFFD, and `<|endoftext|>` like any other text.

        Returns: (tokens,) of `dtype`, without `start_tokens`.
        Raises: InputError if the tokenizer is "chars" and a character is not in the vocabulary.
        """
        return self._encode(without_surrogates(text)).astype(self.dtype, copy=False)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text, as `encode` does, on `threads` threads that run in parallel."""
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        # Several texts per call: passing a thread one short text takes longer than encoding it.
        size = max(1, len(texts) // (8 * threads))
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            encoded = pool.map(lambda group: [self.encode(text) for text in group], groups)
            return [ids for group in encoded for ids in group]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Join the pieces of `ids`. End-of-text becomes `<|endoftext|>`.

        Args: ids: integers in [0, vocab_size).
        Raises: InputError if an id is outside the vocabulary.
        """
        ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int64)
        ids = ids.reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"decode: ids of tokenizer {self.name} must be in [0, {self.vocab_size}), "
                f"got {wrong}"
            )
        return b"".join([self.pieces[i] for i in ids.tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """Convert ids to text. Bytes that are not UTF-8 (part of a character) become U+FFFD.

        Args and Raises: see `decode_bytes`.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Convert the ids of an answer to text, without special tokens that a text can name."""
        return self.decode(ids)

    @property
    def token_ids(self) -> dict[str, int]:
        """Ids of special tokens as a config.json names them, such as {"eos_token_id": 2}."""
        return {"bos_token_id": self.end_of_text, "eos_token_id": self.end_of_text}

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Turn messages into text by the chat template. `encode_rendered` encodes this text.

        Args:
            messages: dictionaries with "role" (system, user, assistant) and "content".
            add_generation_prompt: whether to add the words that begin an answer.
        Raises: InputError if there is no template, or if the template raises an error.
        """
        raise InputError(f"chat: expected a tokenizer with a chat template, {self.name} has none")

    def encode_rendered(self, text: str) -> np.ndarray:
        """Convert text to ids as `encode` does. The names of special tokens become their ids.

        Only a published tokenizer has special tokens that a text can name.
        """
        return self.encode(text)

    def save(self, path: Path | str) -> None:
        """Write the definition as one JSON file: the whole file or nothing."""
        definition = {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "sha256": self.sha256,
            **self._content(),
        }
        write_whole(path, [json.dumps(definition, indent=0).encode()])

    def _content(self) -> dict:
        """Return the fields from which `_from_content` makes the tokenizer again."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        return {"pattern": self.pattern, "pieces": pieces}

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file that `save` wrote, a Hugging Face folder or a GGUF file.

        Raises: InputError if the file is not a tokenizer, has another version or was changed;
            OSError if it cannot be read.
        """
        path = Path(path)
        if (path / EXPORTED_TOKENIZER).is_file():
            path = path / EXPORTED_TOKENIZER
        if path.is_dir() or path.suffix == ".gguf":
            from .published import read_published

            return read_published(path)
        try:
            definition = read_object(path)
            if definition.get("format") != _FORMAT:
                raise ValueError(f"expected the format {_FORMAT}")
            version = definition["version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected tokenizer version {FORMAT_VERSION}, got {version}; "
                    "use the tritium version that wrote it"
                )
            return _from_definition(definition, path)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: expected a tokenizer.json of tritium, got something else ({error}); "
                "for another program's, give its folder"
            ) from None


def _from_definition(definition: dict, path: Path) -> Tokenizer:
    kind, name, stored = (str(definition[key]) for key in ("kind", "name", "sha256"))
    if kind == "published":
        from .published import PublishedTokenizer, unpack_files

        tokenizer = PublishedTokenizer(name, unpack_files(definition))
        _check_sha256(tokenizer.sha256, stored, path)
        return tokenizer
    pieces = [base64.b64decode(piece, validate=True) for piece in definition["pieces"]]
    pattern = str(definition["pattern"])
    found = hash_parts(kind.encode(), pattern.encode(), *pieces)
    _check_sha256(found if kind in _KINDS else "", stored, path)
    check_pieces(kind, pieces, pattern)
    return Tokenizer(kind, name, pieces, pattern)


def _check_sha256(found: str, stored: str, path: Path) -> None:
    if found != stored:
        raise InputError(
            f"{path}: damaged: expected sha256 {stored[:12]}, got {found[:12]}; "
            "copy or build it again"
        )


def hash_parts(*parts: bytes) -> str:
    """Hash each part after its length, so that different parts never give the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def without_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, characters: int) -> Iterator[str]:
    """Cut text into parts that can be encoded separately.

    The ids of the parts, joined, are the ids of the text, for every tokenizer with `can_cut`.

    Args:
        text: any text.
        characters: smallest length of a part. A part ends at the first safe place after it. A text
            without a safe place stays one part.
    """
    start = 0
    while len(text) - start > characters:
        place = SAFE_CUT.search(text, start + characters)
        if place is None:
            break
        yield text[start : place.end()]
        start = place.end()
    yield text[start:] if start else text


# --- from a spec


def needs_corpus(spec: str) -> bool:
    """Return whether the vocabulary of `spec` is learned from the corpus."""
    return spec == "chars" or spec.startswith("bpe:")


def vocab_size_of(spec: str) -> int:
    """Return the vocabulary size of a recipe's spec without reading its text.

    For "chars" this is tinyshakespeare's: 65 characters and end-of-text.
    """
    known = {"bytes": 257, "chars": 66, "gpt2": 50_257}
    return known[spec] if spec in known else int(spec.removeprefix("bpe:"))


def from_spec(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Make the tokenizer that `spec` names. The top of this file lists the specs.

    Args:
        spec: bytes, chars, gpt2, FILE.tiktoken, FILE.json, FOLDER or bpe:SIZE.
        texts: returns the documents, which are read one at a time. Called once if
            `needs_corpus(spec)`, otherwise never.
    Returns: the same tokenizer for the same texts, on any number of threads.
    Raises: InputError for an unknown spec, a bad file, a failed download, a vocabulary size below
        258, or a corpus without any pair of bytes; OSError if the file cannot be read.
    """
    end = END_OF_TEXT.encode()
    if spec == "bytes":
        return Tokenizer("bytes", spec, [*single_bytes(), end])
    if spec == "chars":
        return Tokenizer("chars", spec, [*learn_chars(texts()), end])
    if spec == "gpt2":
        return Tokenizer("bpe", spec, [*download_gpt2(), end], GPT2_PATTERN)
    if spec.endswith(".tiktoken"):
        return Tokenizer("bpe", Path(spec).name, [*read_ranks(Path(spec)), end], GPT2_PATTERN)
    if spec.endswith((".json", ".gguf")) or Path(spec).is_dir():
        return Tokenizer.load(spec)
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not re.fullmatch(r"[0-9]{1,8}", size) or int(size) < _SMALLEST_BPE:
            raise InputError(
                f"tokenizer {spec}: expected a size from {_SMALLEST_BPE} (256 bytes, one "
                f"merge, end-of-text) to 99999999, got {size!r}; try bpe:4096, or bytes"
            )
        pieces = learn_bpe(int(size), texts())
        return Tokenizer("bpe", spec, [*pieces, end], LEARNED_PATTERN)
    hint = did_you_mean(spec.lower(), ("bytes", "chars", "gpt2", DEFAULT_TOKENIZER))
    raise InputError(f"tokenizer: expected {_SPECS}, got {spec!r}{hint}")
