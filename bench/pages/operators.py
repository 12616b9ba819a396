"""tritium bench pages: write the generated parts of docs/operators.

A page is written by hand, except for the text between two comments:

    <!-- generated: SECTION NAME ... -->
    <!-- end -->

SECTION is a name in SECTIONS of _tables.py. Its function writes the text from the code and from
bench/results. NAME is an operator or a file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError, unknown_name
from ...kernels import __all__ as public_names
from ...train.commands.cli import parse
from ._tables import ROOT, SECTIONS, table

PAGES = ROOT / "docs" / "operators"
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
        if section == "index":
            content = _index()
        elif section in SECTIONS:
            content = SECTIONS[section](*names)
        else:
            raise InputError(unknown_name("section", section, ["index", *SECTIONS]))
        return f"{found['begin']}\n{content}\n\n{found['end']}"

    return _PART.sub(part, text)


def page_of() -> dict[str, str]:
    """Return the page of each public operator: the one with its signature."""
    found = {}
    for path in sorted(PAGES.glob("*.md")):
        for part in _PART.finditer(path.read_text(encoding="utf-8")):
            if part["section"] == "signature":
                found |= dict.fromkeys(part["names"].split(), path.name)
    return found


def _index() -> str:
    """Return a table of all public operators, with links to their pages."""
    from ... import kernels

    rows = []
    for name, page in page_of().items():
        summary = getattr(kernels, name).__doc__.strip().split("\n")[0]
        rows.append([f"[`{name}`]({page})", summary.replace("`", "")])
    return table(["operator", "what it does"], rows, texts=2)


def main(argv: Sequence[str]) -> int:
    """Run `tritium bench pages`. Returns: exit status."""
    about = "Write the generated parts of docs/operators from the code and bench/results."
    parse(PagesOptions, argv, prog="tritium bench pages", description=about)
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(render(text), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    missing = sorted(set(public_names) - page_of().keys())
    if missing:
        raise InputError(f"{PAGES}: expected a page with the signature of {', '.join(missing)}")
    return 0
