"""Tokenizers: text to token ids and back, from a one-word spec.

    bytes          256 bytes, then end-of-text
    chars          the sorted characters of the corpus, then end-of-text
    gpt2           OpenAI's 50,257 tokens (tiktoken downloads them once)
    FILE.tiktoken  ranks in tiktoken's file format, GPT-2's split pattern, then end-of-text
    bpe:4096       byte pairs learned from the corpus, 4,096 ids with end-of-text

Every kind is a list of byte pieces (the id is the place in the list, end-of-text the last) and, for byte pairs, the pattern
that splits text before merging. That is the whole definition: `sha256` covers it, `tokenizer.json` holds it. Text that looks
like `<|endoftext|>` is ordinary text; only the code that joins documents inserts the id.

Byte pairs are learned by rustbpe and applied by tiktoken. rustbpe trains straight to tiktoken's ranks, its wheel is 1.1 MB,
built for Python 3.10 and 3.13 alike, and any number of threads learns the same vocabulary. HF tokenizers trains as well, but to
its own pipeline format. One run on 2 cores of an AMD EPYC, November 2026, 12 MB of Python to 4,096 tokens: learned in 1.0 s (HF
1.3 s), encoded at 16 MB/s (HF 5.4 MB/s, the same pattern).
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

# Quantifiers that cannot give anything back are possessive (`++`): the same matches without a backtracking stack.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
# For learned vocabularies, after GPT-4: a run of spaces is one piece, so that indentation is one token; punctuation keeps its
# line end. Numbers go two digits at a time, because all 1,000 three-digit ones would fill a quarter of a 4,096 vocabulary.
LEARNED_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+"

# Both patterns always end a piece after a lone line end before text, and before a lone space between letters, whatever
# surrounds them, so text cut there gets the ids it would get whole.
_SAFE_CUT = re.compile(r"\S\n(?=\S)|[A-Za-z](?= [A-Za-z])")
# tiktoken's regular expressions give up on a run of 1,000,000 spaces; such text is encoded in steps of this many characters.
_STEP_CHARACTERS = 1 << 19
_SMALLEST_BPE = 258  # 256 bytes, one merge, end-of-text
_KINDS = ("bytes", "chars", "bpe")
_SPECS = "bytes, chars, gpt2, FILE.tiktoken or bpe:SIZE"


class Tokenizer:
    """A list of byte pieces and the rule that cuts text into them. Made by `from_spec` or `Tokenizer.load`.

    Attributes:
        kind: "bytes", "chars" or "bpe".
        name: the spec it was made from, without folders; shown to people, not part of `sha256`.
        pieces: the bytes of each id; ids are [0, vocab_size), the last is end-of-text.
        pattern: the split pattern of "bpe", else "".
        vocab_size, end_of_text: int; end-of-text included in the size.
        dtype: numpy uint16 where every id fits, else uint32.
        sha256: 64 hex digits over kind, pattern and pieces: equal exactly where every text gets the same ids.
    """

    def __init__(self, kind: str, name: str, pieces: Sequence[bytes], pattern: str = ""):
        self.kind, self.name, self.pieces, self.pattern = kind, name, list(pieces), pattern
        self.vocab_size = len(self.pieces)
        self.end_of_text = self.vocab_size - 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.sha256 = _definition_sha256(kind, pattern, self.pieces)
        encoders = {"bytes": _bytes_encoder, "chars": _chars_encoder, "bpe": _bpe_encoder}
        self._encode: Callable[[str], np.ndarray] = encoders[kind](self)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, {self.vocab_size} tokens, {self.sha256[:12]})"

    def encode(self, text: str) -> np.ndarray:
        """Turn text into ids; lone surrogates count as U+FFFD, `<|endoftext|>` as ordinary text.

        Returns: (tokens,) of `dtype`.
        Raises:  InputError if kind is "chars" and a character is not in the vocabulary.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text).astype(self.dtype, copy=False)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Encode every text, on `threads` threads (tiktoken lets go of the interpreter lock); see `encode`."""
        if threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        # Several texts to a task: handing over one short text costs more than encoding it.
        size = max(1, len(texts) // (8 * threads))
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda group: [self.encode(text) for text in group], groups)
            return [ids for group in done for ids in group]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Join the pieces of `ids`, integers in [0, vocab_size); end-of-text becomes `<|endoftext|>`.

        Raises:  InputError for an id outside the vocabulary.
        """
        ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids), dtype=np.int64).reshape(
            -1
        )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(
                f"decode: ids of tokenizer {self.name} must be in [0, {self.vocab_size}), got {wrong}"
            )
        return b"".join([self.pieces[i] for i in ids.tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; bytes that are not UTF-8 (a character cut in two) become U+FFFD. See `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: Path | str) -> None:
        """Write the definition as one JSON file, whole or not at all."""
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
        """Read what `save` wrote.

        Raises:  InputError if the file is not a tokenizer, is of another version or was changed; OSError if unreadable.
        """
        try:
            definition = json.loads(Path(path).read_bytes())
            version = definition["version"]
            if version != FORMAT_VERSION:
                raise InputError(
                    f"{path}: expected tokenizer version {FORMAT_VERSION}, got {version}; use the tritium that wrote it"
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
                f"{path}: damaged: sha256 {stored[:12]} stored, {found[:12]} found; copy or build it again"
            )
        return cls(kind, name, pieces, pattern)


def _definition_sha256(kind: str, pattern: str, pieces: Sequence[bytes]) -> str:
    """Lengths go in too, so that no two definitions run into the same bytes."""
    digest = hashlib.sha256()
    for part in (kind.encode(), pattern.encode(), *pieces):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


# --- encoders: text without lone surrogates to ids, as any unsigned type


def _bytes_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    return lambda text: np.frombuffer(text.encode(), dtype=np.uint8)


def _chars_encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    characters = np.array([ord(piece.decode()) for piece in tokenizer.pieces[:-1]], dtype=np.uint32)
    unknown = tokenizer.vocab_size
    # One entry more than the largest character, which stands for everything above it.
    ids = np.full(int(characters.max()) + 2, unknown, dtype=np.uint32)
    ids[characters] = np.arange(len(characters), dtype=np.uint32)

    def encode(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        found = ids[np.minimum(points, len(ids) - 1)]
        if (missing := np.flatnonzero(found == unknown)).size:
            character = text[missing[0]]
            raise InputError(
                f"tokenizer chars: expected one of the {len(characters)} characters of its corpus, got {character!r} "
                f"(U+{ord(character):04X}) at character {missing[0]}; remove it or take bytes, gpt2 or bpe:SIZE"
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
    """Cut long text into parts of about `characters` or more, where no token of any kind reaches across.

    Joined ids of the parts are the ids of the whole; text without such a place stays in one part.
    """
    start = 0
    while len(text) - start > characters and (place := _SAFE_CUT.search(text, start + characters)):
        yield text[start : place.end()]
        start = place.end()
    yield text[start:] if start else text


# --- from a spec


def needs_corpus(spec: str) -> bool:
    """Whether the vocabulary of `spec` comes from the corpus."""
    return spec == "chars" or spec.startswith("bpe:")


def vocab_size_of(spec: str) -> int:
    """Size of a recipe's vocabulary before its text was seen; that of "chars" is tinyshakespeare's, with end-of-text."""
    known = {"bytes": 257, "chars": 66, "gpt2": 50_257}
    return known[spec] if spec in known else int(spec.removeprefix("bpe:"))


def from_spec(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Make the tokenizer that `spec` names (see the top of this file).

    Args:    spec: bytes, chars, gpt2, FILE.tiktoken or bpe:SIZE.
             texts: called at most once, and only where `needs_corpus(spec)`; its documents are read one at a time.
    Returns: the same tokenizer for the same texts, on any number of threads.
    Raises:  InputError for an unknown spec, a bad file, an unreachable download, a vocabulary too small, or a corpus too
             small for it; OSError if the file cannot be read.
    """
    if spec == "bytes":
        return Tokenizer("bytes", spec, [*_single_bytes(), END_OF_TEXT.encode()])
    if spec == "chars":
        return _learn_chars(texts())
    if spec == "gpt2":
        return _download_gpt2()
    if spec.endswith(".tiktoken"):
        return Tokenizer(
            "bpe", Path(spec).name, [*_read_ranks(Path(spec)), END_OF_TEXT.encode()], GPT2_PATTERN
        )
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isascii() or not size.isdecimal() or int(size) < _SMALLEST_BPE:
            raise InputError(
                f"tokenizer {spec}: the vocabulary size must be a whole number from {_SMALLEST_BPE} up (256 bytes, merges, "
                f"end-of-text), got {size!r}; try bpe:4096, or bytes"
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
        raise InputError(
            "tokenizer chars: expected a corpus with characters, got none; give it text"
        )
    return Tokenizer(
        "chars",
        "chars",
        [*(character.encode() for character in sorted(found)), END_OF_TEXT.encode()],
    )


def _download_gpt2() -> Tokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (
        Exception
    ) as error:  # requests has its own tree of errors, tiktoken raises ValueError for a bad hash
        raise InputError(
            f"tokenizer gpt2: tiktoken could not download its ranks ({type(error).__name__}); "
            "connect once, or pass a FILE.tiktoken with GPT-2's ranks as the tokenizer"
        ) from None
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 1)]
    return Tokenizer("bpe", "gpt2", [*pieces, END_OF_TEXT.encode()], GPT2_PATTERN)


def _read_ranks(path: Path) -> list[bytes]:
    """Lines of base64, a space and the rank; ranks 0, 1, 2 … in any order."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[int(rank)] = base64.b64decode(piece, validate=True)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{path}:{number}: expected base64, a space and a rank (tiktoken's format), got {line[:40]!r}"
            ) from None
    if sorted(ranks) != list(range(len(ranks))) or len(set(ranks.values())) != len(ranks):
        raise InputError(
            f"{path}: expected each rank from 0 to {len(ranks) - 1} once with its own piece; get the file again"
        )
    if missing := set(_single_bytes()) - set(ranks.values()):
        raise InputError(
            f"{path}: expected all 256 single bytes among the pieces, {len(missing)} are missing; get the file again"
        )
    return [ranks[i] for i in range(len(ranks))]


def _learn_bpe(size: int, texts: Iterable[str]) -> Tokenizer:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    # It holds `buffer_size` documents at a time; its default of 8,192 books would be gigabytes.
    trainer.train_from_iterator(iter(texts), size - 1, buffer_size=256, pattern=LEARNED_PATTERN)
    pieces = [bytes(piece) for piece, _ in trainer.get_mergeable_ranks()]
    if len(pieces) < size - 1:
        raise InputError(
            f"tokenizer bpe:{size}: the corpus yields only {len(pieces) - 256} merges, {size - 257} were expected; "
            f"give more text or take bpe:{len(pieces) + 1} or less"
            if len(pieces) > 256
            else f"tokenizer bpe:{size}: the corpus yields no merges, {size - 257} were expected; give more text or take bytes"
        )
    return Tokenizer("bpe", f"bpe:{size}", [*pieces, END_OF_TEXT.encode()], LEARNED_PATTERN)
