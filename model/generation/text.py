"""Text of a growing list of tokens: whole characters only, and up to a stop text."""

import codecs
from collections.abc import Callable, Iterable, Sequence


class TextStream:
    """Turn tokens into text, piece by piece. The joined pieces are the text of all tokens.

    A character may be split over tokens, and so may a stop text. Text is held back while it is the
    beginning of a character, or while it could begin a stop text. Bytes that are not UTF-8 become
    U+FFFD, as in `bytes.decode("utf-8", "replace")`.

    Args:
        decode_bytes: returns the bytes of tokens. The bytes of each token do not depend on others.
        stop: texts that end the text. They are not part of it.
    Attributes:
        is_stopped: whether a stop text was found.
    """

    def __init__(self, decode_bytes: Callable[[Iterable[int]], bytes], stop: Sequence[str] = ()):
        self.is_stopped = False
        self._decode_bytes = decode_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token. Return the text that is certain now."""
        return self._add(self._decoder.decode(self._decode_bytes([token])))

    def finish(self) -> str:
        """Return the text that was held back. No token may follow."""
        text = self._add(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        self.is_stopped = bool(starts)
        end = min(starts) if starts else len(self._held) - self._possible_stop()
        text = self._held[:end]
        self._held = "" if starts else self._held[end:]
        return text

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the held text that begins a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
