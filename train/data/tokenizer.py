"""Tokenizers: text to token ids and back, made from a one-word spec.

    bytes          256 bytes, then end-of-text
    chars          the sorted characters of the corpus, then end-of-text
    gpt2           OpenAI's 50,257 tokens (tiktoken downloads them once)
    FILE.tiktoken  ranks in tiktoken's file format, with GPT-2's split pattern, then end-of-text
    FILE.json      the tokenizer.json of a run or a dataset
    bpe:4096       byte pairs learned from the corpus; 4,096 ids, the last is end-of-text

A tokenizer is a list of byte strings, its pieces. The id of a piece is its index in the list, and
the last piece is end-of-text. A byte-pair tokenizer also has the pattern that splits text before
pairs are merged. `sha256` covers this definition and `tokenizer.json` stores it. `<|endoftext|>` in
a text is encoded like any other text. Only build.py inserts the end-of-text id, between documents.

rustbpe learns byte pairs and tiktoken applies them. rustbpe gives tiktoken's ranks directly, its
wheel is 1.1 MB and runs on Python 3.10 to 3.13, and it learns the same vocabulary on any number of
threads. Hugging Face tokenizers can learn too, but only in its own pipeline format. Measured on 2
cores of an AMD EPYC, November 2026, with 12 MB of Python and 4,096 tokens: learning takes 1.0 s
(Hugging Face 1.3 s), and encoding runs at 16 MB/s (Hugging Face 5.4 MB/s with the same pattern).
"""

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..files import write_whole

END_OF_TEXT = "<|endoftext|>"
DEFAULT_TOKENIZER = "bpe:4096"
FORMAT_VERSION = 1

# Quantifiers that never need to backtrack are possessive (`++`). The matches are the same, and the
# regular expression engine needs no backtracking stack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
# The pattern for learned vocabularies follows GPT-4's. A run of spaces is one piece, so indentation
# becomes one token. Punctuation keeps its line end. A number is split into pieces of two digits,
# because the 1,000 numbers of three digits would fill a quarter of a vocabulary of 4,096.
LEARNED_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Places where text may be cut without changing its ids: after a single line end that is followed by
# text, and before a single space between two letters. Both patterns always end a piece there.
_SAFE_CUT = re.compile(r"\S\n(?=\S)|[A-Za-z](?= [A-Za-z])")
# tiktoken fails on a run of 1,000,000 spaces. Such text is encoded in parts of this length.
_STEP_CHARACTERS = 1 << 19
_SMALLEST_BPE = 258  # 256 bytes, one merge, end-of-text
_KINDS = ("bytes", "chars", "bpe")
_SPECS = "bytes, chars, gpt2, FILE.tiktoken, FILE.json or bpe:SIZE"


class Tokenizer:
    """Encode text to ids and decode ids to text. Made by `from_spec` or `Tokenizer.load`.

    Attributes:
        kind: "bytes", "chars" or "bpe".
        name: the spec without folders. It is shown to users and is not part of `sha256`.
        pieces: the bytes of each id. Ids are in [0, vocab_size).
        pattern: the split pattern of a "bpe" tokenizer, otherwise "".
        vocab_size: number of ids, end-of-text included.
        end_of_text: the last id.
        dtype: numpy uint16 if all ids fit, otherwise uint32.
        sha256: 64 hex digits, the hash of kind, pattern and pieces. Tokenizers with equal hashes
            give equal ids for every text.
    """

    def __init__(self, kind: str, name: str, pieces: Sequence[bytes], pattern: str = ""):
        self.kind = kind
        self.name = name
        self.pieces = list(pieces)
        self.pattern = pattern
        self.vocab_size = len(self.pieces)
        self.end_of_text = self.vocab_size - 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.sha256 = _definition_sha256(kind, pattern, self.pieces)
        encoders = {"bytes": _bytes_encoder, "chars": _chars_encoder, "bpe": _bpe_encoder}
        self._encode: Callable[[str], np.ndarray] = encoders[kind](self)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.vocab_size} tokens, {self.sha256[:12]})"

    def encode(self, text: str) -> np.ndarray:
        """Convert text to ids.

        A lone surrogate is encoded as U+FFFD, and `<|endoftext|>` like any other text.

        Returns: (tokens,) of `dtype`.
        Raises: InputError if the tokenizer is "chars" and a character is not in the vocabulary.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text).astype(self.dtype, copy=False)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode each text, as `encode` does, on `threads` threads.

        tiktoken releases the interpreter lock, so the threads run in parallel.
        """
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        # Give a thread several texts at a time: passing it one short text takes longer than
        # encoding that text.
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

    def save(self, path: Path | str) -> None:
        """Write the definition as one JSON file: the whole file or nothing."""
        definition = {
            "format": "tritium tokenizer",
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "sha256": self.sha256,
            "pattern": self.pattern,
            "pieces": [base64.b64encode(piece).decode() for piece in self.pieces],
        }
        write_whole(path, [json.dumps(definition, indent=0).encode()])

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file that `save` wrote.

        Raises: InputError if the file is not a tokenizer, has another version or was changed;
            OSError if it cannot be read.
        """
        try:
            definition = json.loads(Path(path).read_bytes())
            version = definition["version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected tokenizer version {FORMAT_VERSION}, got {version}; "
                    "use the tritium version that wrote it"
                )
            pieces = [base64.b64decode(piece, validate=True) for piece in definition["pieces"]]
            kind, name, pattern, stored = (
                str(definition[key]) for key in ("kind", "name", "pattern", "sha256")
            )
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: expected a tokenizer.json of tritium, got something else ({error!r})"
            ) from None
        found = _definition_sha256(kind, pattern, pieces)
        if kind not in _KINDS or found != stored:
            raise InputError(
                f"{path}: damaged: expected sha256 {stored[:12]}, got {found[:12]}; "
                "copy or build it again"
            )
        return cls(kind, name, pieces, pattern)


def _definition_sha256(kind: str, pattern: str, pieces: Sequence[bytes]) -> str:
    """Hash each part after its length, so that two definitions never give the same bytes."""
    digest = hashlib.sha256()
    for part in (kind.encode(), pattern.encode(), *pieces):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


# --- encoders: text without lone surrogates to ids of any unsigned dtype


def _bytes_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    return lambda text: np.frombuffer(text.encode(), dtype=np.uint8)


def _chars_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    characters = np.array([ord(piece.decode()) for piece in tokenizer.pieces[:-1]], dtype=np.uint32)
    unknown = tokenizer.vocab_size
    # A table from code point to id. Its last entry stands for all larger code points.
    ids = np.full(int(characters.max()) + 2, unknown, dtype=np.uint32)
    ids[characters] = np.arange(len(characters), dtype=np.uint32)

    def encode(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        found = ids[np.minimum(points, len(ids) - 1)]
        missing = np.flatnonzero(found == unknown)
        if missing.size:
            character = text[missing[0]]
            raise InputError(
                f"tokenizer chars: expected one of the {len(characters)} characters of its corpus, "
                f"got {character!r} (U+{ord(character):04X}) at character {missing[0]}; remove it, "
                "or use the tokenizer bytes, gpt2 or bpe:SIZE"
            )
        return found

    return encode


def _bpe_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    import tiktoken

    encoding = tiktoken.Encoding(
        tokenizer.name,
        pat_str=tokenizer.pattern,
        mergeable_ranks={piece: rank for rank, piece in enumerate(tokenizer.pieces[:-1])},
        special_tokens={END_OF_TEXT: tokenizer.end_of_text},
    )
    encode_once = functools.partial(encoding.encode_to_numpy, disallowed_special=())

    def encode(text: str) -> np.ndarray:
        try:
            return encode_once(text)
        except ValueError:
            starts = range(0, len(text), _STEP_CHARACTERS)
            return np.concatenate(
                [encode_once(text[start : start + _STEP_CHARACTERS]) for start in starts]
            )

    return encode


def cut(text: str, characters: int) -> Iterator[str]:
    """Cut text into parts that can be encoded separately.

    The ids of the parts, joined, are the ids of the text, for every tokenizer.

    Args:
        text: any text.
        characters: smallest length of a part. A part ends at the first safe place after it. A text
            without a safe place stays one part.
    """
    start = 0
    while len(text) - start > characters:
        place = _SAFE_CUT.search(text, start + characters)
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
        spec: bytes, chars, gpt2, FILE.tiktoken, FILE.json or bpe:SIZE.
        texts: returns the documents, which are read one at a time. Called once if
            `needs_corpus(spec)`, otherwise never.
    Returns: the same tokenizer for the same texts, on any number of threads.
    Raises: InputError for an unknown spec, a bad file, a failed download, a vocabulary size below
        258, or a corpus too small for the vocabulary; OSError if the file cannot be read.
    """
    if spec == "bytes":
        return Tokenizer("bytes", spec, [*_single_bytes(), END_OF_TEXT.encode()])
    if spec == "chars":
        return _learn_chars(texts())
    if spec == "gpt2":
        return _download_gpt2()
    if spec.endswith(".tiktoken"):
        pieces = [*_read_ranks(Path(spec)), END_OF_TEXT.encode()]
        return Tokenizer("bpe", Path(spec).name, pieces, GPT2_PATTERN)
    if spec.endswith(".json"):
        return Tokenizer.load(spec)
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isascii() or not size.isdecimal() or int(size) < _SMALLEST_BPE:
            raise InputError(
                f"tokenizer {spec}: expected a vocabulary size of {_SMALLEST_BPE} or more "
                f"(256 bytes, one merge, end-of-text), got {size!r}; try bpe:4096, or bytes"
            )
        return _learn_bpe(int(size), texts())
    raise InputError(f"tokenizer: expected {_SPECS}, got {spec!r}")


def _single_bytes() -> list[bytes]:
    return [bytes([i]) for i in range(256)]


def _learn_chars(texts: Iterable[str]) -> Tokenizer:
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise InputError("tokenizer chars: expected a corpus with characters, got none; add text")
    pieces = [character.encode() for character in sorted(found)]
    return Tokenizer("chars", "chars", [*pieces, END_OF_TEXT.encode()])


def _download_gpt2() -> Tokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    # requests has its own exceptions, and tiktoken raises ValueError for a wrong hash.
    except Exception as error:
        raise InputError(
            f"tokenizer gpt2: tiktoken could not download its ranks ({type(error).__name__}); "
            "connect to the internet once, or use a FILE.tiktoken with GPT-2's ranks"
        ) from None
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    return Tokenizer("bpe", "gpt2", [*pieces, END_OF_TEXT.encode()], GPT2_PATTERN)


def _read_ranks(path: Path) -> list[bytes]:
    """Read lines of base64, a space and a rank. The ranks are 0, 1, 2 ... in any order."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[int(rank)] = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path}:{number}: expected base64, a space and a rank (tiktoken's format), "
                f"got {line[:40]!r}"
            ) from None
    if sorted(ranks) != list(range(len(ranks))) or len(set(ranks.values())) != len(ranks):
        raise InputError(
            f"{path}: expected each rank from 0 to {len(ranks) - 1} once, with its own piece; "
            "get the file again"
        )
    missing = set(_single_bytes()) - set(ranks.values())
    if missing:
        raise InputError(
            f"{path}: expected all 256 single bytes among the pieces, {len(missing)} are missing; "
            "get the file again"
        )
    return [ranks[i] for i in range(len(ranks))]


def _learn_bpe(size: int, texts: Iterable[str]) -> Tokenizer:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    # rustbpe holds `buffer_size` documents in memory. Its default of 8,192 would take
    # gigabytes for books.
    trainer.train_from_iterator(iter(texts), size - 1, buffer_size=256, pattern=LEARNED_PATTERN)
    pieces = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    merges = len(pieces) - 256
    expected = size - 257
    if merges < expected:
        smaller = f"bpe:{len(pieces) + 1} or less" if merges > 0 else "bytes"
        raise InputError(
            f"tokenizer bpe:{size}: expected a corpus that gives {expected} merges, "
            f"got {max(merges, 0)}; add text or use {smaller}"
        )
    return Tokenizer("bpe", f"bpe:{size}", [*pieces, END_OF_TEXT.encode()], LEARNED_PATTERN)
