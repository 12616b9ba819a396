"""tritium bench pages: write the generated parts of the documentation.

A page is written by hand, except for the text between two comments:

    <!-- generated: SECTION NAME ... -->
    <!-- end -->

SECTION is a row of SECTIONS. Its function returns the text, from the code and from bench/results.
NAME is an operator or a file.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, unknown_name
from ...kernels import __all__ as public_names
from ...train.commands.cli import parse
from .. import ROOT
from ..record import check_checkout
from . import _tables, _training
from ._tables import table

DOCS = ROOT / "docs"
_PART = re.compile(
    r"(?P<begin><!-- generated: (?P<section>[\w-]+)(?P<names>[^>\n]*) -->\n)"
    r".*?(?P<end><!-- end -->)",
    flags=re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class PagesOptions:
    """Options of `tritium bench pages`."""


def render(text: str) -> str:
    """Return a page with new generated parts.

    Raises: InputError for an unknown section.
    """

    def part(found: re.Match) -> str:
        section, names = found["section"], found["names"].split()
        if section not in SECTIONS:
            raise InputError(unknown_name("section", section, SECTIONS))
        return f"{found['begin']}\n{SECTIONS[section](*names)}\n\n{found['end']}"

    return _PART.sub(part, text)


def page_of() -> dict[str, str]:
    """Return the page of each public operator: the one with its signature."""
    found = {}
    for path in pages():
        for part in _PART.finditer(path.read_text(encoding="utf-8")):
            if part["section"] == "signature":
                found |= dict.fromkeys(part["names"].split(), path.name)
    return found


def pages() -> list[Path]:
    """Return the pages that are written by hand. docs/build.py writes those in docs/api."""
    return sorted(path for path in DOCS.rglob("*.md") if path.parent != DOCS / "api")


def write_pages() -> list[Path]:
    """Write the generated parts of all pages. Returns: the pages that changed."""
    changed = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (rendered := render(text)) != text:
            path.write_text(rendered, encoding="utf-8")
            changed.append(path)
    return changed


def _index() -> str:
    """Return a table of all public operators, with links to their pages."""
    from ... import kernels

    rows = []
    for name, page in page_of().items():
        summary = getattr(kernels, name).__doc__.strip().split("\n")[0]
        rows.append([f"[`{name}`]({page})", summary.replace("`", "")])
    return table(["operator", "what it does"], rows, texts=2)


# Name in a comment -> function that returns the text.
SECTIONS: dict[str, Callable[..., str]] = {
    "index": _index,
    **_tables.SECTIONS,
    **_training.SECTIONS,
}


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench pages`. Returns: exit status."""
    about = "Write the generated parts of the documentation from the code and bench/results."
    parse(PagesOptions, argv, prog="tritium bench pages", description=about)
    check_checkout("tritium bench pages")
    for path in write_pages():
        print(f"written: {path.relative_to(ROOT)}")
    missing = sorted(set(public_names) - page_of().keys())
    if missing:
        raise InputError(f"{DOCS}: expected a page with the signature of {', '.join(missing)}")
    return 0
