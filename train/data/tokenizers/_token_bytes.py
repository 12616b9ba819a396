"""The bytes of each token, from a tokenizer.json of the package tokenizers."""

import re
from collections.abc import Callable
from typing import Any

from ....errors import InputError
from ._definition import parts_of

# Largest number of ids. Each id takes memory, even an id that no token has.
_MOST_IDS = 1 << 24
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def pieces_of(definition: dict[str, Any], ids: dict[str, int]) -> list[bytes]:
    """Return the bytes of each id. An id that no token has stands for no bytes."""
    largest = max(ids.values())
    if largest >= _MOST_IDS:
        raise InputError(f"tokenizer.json: expected ids below {_MOST_IDS}, got {largest}")
    added = {each["id"] for each in definition.get("added_tokens") or []}
    to_bytes = _piece_decoder(definition)
    pieces = [b""] * (1 + largest)
    for token, number in ids.items():
        pieces[number] = token.encode() if number in added else to_bytes(token)
    return pieces


def _piece_decoder(definition: dict[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a token to its bytes that the decoder describes."""
    space = None
    has_bytes = has_byte_tokens = False
    for part in parts_of(definition, "decoder"):
        kind = part.get("type")
        if kind == "ByteLevel":
            has_bytes = True
        elif kind == "ByteFallback":
            has_byte_tokens = True
        elif kind == "Metaspace":
            space = part["replacement"]
        elif kind == "Replace" and part["content"] == " ":
            if "String" not in part["pattern"]:
                raise InputError(
                    "decoder: expected Replace with a String as its pattern, got a Regex; tritium "
                    "cannot turn its tokens into bytes"
                )
            space = part["pattern"]["String"]
        elif kind not in ("Fuse", "Strip"):
            raise InputError(
                f"decoder: expected ByteLevel, ByteFallback or Metaspace, got {kind}; tritium "
                "cannot turn its tokens into bytes"
            )

    alphabet = {character: byte for byte, character in enumerate(_byte_characters())}

    def to_bytes(token: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        if has_byte_tokens and match:
            return bytes([int(match[1], 16)])
        if has_bytes and all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return (token if space is None else token.replace(space, " ")).encode()

    return to_bytes


def _byte_characters() -> str:
    """Return the 256 characters that stand for bytes in GPT-2's vocabulary, in the bytes' order.

    A printable byte of Latin-1 stands for itself. The others take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))
