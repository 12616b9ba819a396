"""Read the definition of a tokenizer: a tokenizer.json of the package tokenizers.

Parts of a long document are encoded separately. Most patterns end a piece of text in the places
where `cut` cuts. Some do not: o200k's has a piece ";\\n//", and a ByteLevel without a pattern has
one piece per text. So `can_cut` tries examples.
"""

import itertools
from typing import Any

from .tokenizer import SAFE_CUT

_BEFORE = "aZé1;}'日"
_AFTER = "aZé1/#'日"
_EXAMPLES = [(f"{a}\n", b) for a, b in itertools.product(_BEFORE, _AFTER)]
_EXAMPLES += [(a, f" {b}") for a, b in itertools.product("aZ", "aZ")]


def parts_of(definition: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the parts of a decoder, pre-tokenizer or post-processor. A part may have no type."""
    part = definition.get(name)
    if part is None:
        return []
    if part.get("type") == "Sequence":
        lists = (part.get(key) for key in ("decoders", "pretokenizers", "processors"))
        return next(filter(None, lists), [])
    return [part]


def undefined_tokens(definition: dict[str, Any]) -> list[str]:
    """Return the special tokens that a post-processor puts around a text and does not define."""
    return [
        piece["SpecialToken"]["id"]
        for part in parts_of(definition, "post_processor")
        for piece in (*part.get("single", ()), *part.get("pair", ()))
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in part["special_tokens"]
    ]


def can_cut(definition: dict[str, Any], backend) -> bool:
    """Return whether the parts that `cut` gives can be encoded separately.

    Text must be split at each cut before merging. No space may be put before a part. No cut may be
    inside an added token.

    Args: backend: the Tokenizer of the package tokenizers with this definition.
    """
    parts = parts_of(definition, "pre_tokenizer")
    has_bytes = any(part.get("type") == "ByteLevel" for part in parts)
    if not has_bytes or any(part.get("add_prefix_space") for part in parts):
        return False
    for token in definition.get("added_tokens") or []:
        if not token["special"] and _reaches_over_cut(token):
            return False
    return all(
        _pieces(backend, a + b) == _pieces(backend, a) + _pieces(backend, b) for a, b in _EXAMPLES
    )


def _reaches_over_cut(token: dict[str, Any]) -> bool:
    """Return whether a cut can be inside an added token, or inside the spaces that it takes."""
    if token.get("lstrip") or token.get("rstrip"):
        return True
    content = token["content"]
    # Letters next to the token allow the most cuts.
    places = (match.end() - 1 for match in SAFE_CUT.finditer(f"a{content}a"))
    return any(0 < place < len(content) for place in places)


def _pieces(backend, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
