"""Whether a published tokenizer encodes the parts that `cut` gives as it encodes the text.

Most patterns end a piece of text in the places where `cut` cuts. Some do not: o200k's has a piece
";\\n//", and a ByteLevel without a pattern has one piece per text. So examples are tried.
"""

import itertools
from collections.abc import Iterable

from .tokenizer import SAFE_CUT

_BEFORE = "aZ\u00e91;}'\u65e5"
_AFTER = "aZ\u00e91/#'\u65e5"
_EXAMPLES = [(f"{a}\n", b) for a, b in itertools.product(_BEFORE, _AFTER)]
_EXAMPLES += [(a, f" {b}") for a, b in itertools.product("aZ", "aZ")]


def splits_at_cuts(backend, added_tokens: Iterable[str]) -> bool:
    """Return whether no piece of text and no added token reaches over a place of SAFE_CUT.

    Args:
        backend: a Tokenizer of the package tokenizers.
        added_tokens: the names of the added tokens that a text can have.
    """
    if backend.pre_tokenizer is None or any(map(SAFE_CUT.search, added_tokens)):
        return False
    return all(
        _pieces(backend, a + b) == _pieces(backend, a) + _pieces(backend, b) for a, b in _EXAMPLES
    )


def _pieces(backend, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
