"""Convert the docstring of a kernel file to Markdown, so that its math is written in one place.

A docstring has paragraphs. A paragraph of indented lines is math. A paragraph that begins with
"Label  text" is a list of labels. Every other paragraph is text.
"""

import re
import textwrap

_LABEL = re.compile(r"([A-Z]\w*(?: \w+)?) {2,}(\S.*)")
# Names of the code: cu_seqlens, _kernels.py, core/dropout.py, cost(). Not indices: p_j.
_CODE = re.compile(r"[\w/]*_\w\w+(?:\.py)?(?:\(\))?|[\w/]+\.py|\w+\(\)")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def to_markdown(docstring: str) -> str:
    """Return the docstring of a module as Markdown."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = paragraph.split("\n")
        if all(line.startswith(" ") for line in lines):
            parts.append(_verbatim(lines))
        elif _LABEL.fullmatch(lines[0]):
            parts += _labels(lines)
        else:
            parts.append(_text(lines))
    return "\n\n".join(parts)


def _labels(lines: list[str]) -> list[str]:
    """Return a paragraph per label of "Label  text", whose text may have more lines."""
    parts = []
    while lines:
        label, text = _LABEL.fullmatch(lines[0]).groups()
        count = 1
        while count < len(lines) and not _LABEL.fullmatch(lines[count]):
            count += 1
        more = textwrap.dedent("\n".join(lines[1:count])).split("\n") if count > 1 else []
        content, lines = [text, *more], lines[count:]
        # Text has single spaces. Columns stay as they are.
        if label == "Shapes" or any("   " in line for line in content if line[0] != " "):
            parts += [f"**{label}**", _verbatim(content)]
            continue
        # Lines with more indentation are tables.
        blocks, is_table = [[]], False
        for line in content:
            if line.startswith(" ") != is_table:
                blocks.append([])
                is_table = not is_table
            blocks[-1].append(line)
        parts.append(f"**{label}**: {_text(blocks[0])}")
        parts += [
            _verbatim(block) if number % 2 else _text(block)
            for number, block in enumerate(blocks[1:], start=1)
        ]
    return parts


def _verbatim(lines: list[str]) -> str:
    """Return lines as a block of code, without their common indentation."""
    return f"```text\n{textwrap.dedent(chr(10).join(lines))}\n```"


def _text(lines: list[str]) -> str:
    """Return lines as a paragraph. Names of the code become code."""
    pieces = " ".join(lines).split("`")
    for number, piece in enumerate(pieces):
        pieces[number] = f"`{piece}`" if number % 2 else _plain(piece)
    return "".join(pieces)


def _plain(text: str) -> str:
    """Mark names as code, link papers, and escape characters that Markdown would interpret."""
    parts, end = [], 0
    for name in _CODE.finditer(text):
        parts += [_escape(text[end : name.start()]), f"`{name[0]}`"]
        end = name.end()
    return "".join([*parts, _escape(text[end:])])


def _escape(text: str) -> str:
    text = re.sub(r"[*<\[\]]", r"\\\g<0>", text)
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", text)
