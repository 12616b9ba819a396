"""The samples of a run: RUN/samples.txt, one after each evaluation.

--- step 250
the text of the sample
"""

import re
from pathlib import Path

from ..storage.files import write_whole

_HEADER = re.compile(rb"^--- step (\d{1,18})$", re.MULTILINE)


def add_sample(run: Path, step: int, text: str) -> None:
    """Write the sample after `step` steps, in place of samples of this step and later ones.

    A resumed run repeats steps, and so evaluations. The file is written whole or not at all, and
    never through a link.
    """
    file = run / "samples.txt"
    earlier = _read(file)
    for header in _HEADER.finditer(earlier):
        if int(header[1]) >= step:
            earlier = earlier[: header.start()]
            break
    if earlier and not earlier.endswith(b"\n"):
        earlier += b"\n"
    # A line of the text that looks like a header gets a space before it.
    content = _HEADER.sub(rb" \g<0>", text.encode("utf-8", "replace"))
    write_whole(file, [earlier, b"--- step %d\n" % step, content, b"\n"])


def last_sample(run: Path) -> str:
    """Return the text of the last sample; "" if there is none."""
    content = _read(run / "samples.txt")
    headers = list(_HEADER.finditer(content))
    text = content[headers[-1].end() + 1 :] if headers else b""
    return text.decode("utf-8", "replace")


def _read(file: Path) -> bytes:
    is_plain = file.is_file() and not file.is_symlink()
    return file.read_bytes() if is_plain else b""
