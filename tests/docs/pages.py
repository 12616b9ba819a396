"""The pages of the documentation, and their fenced blocks."""

from pathlib import Path

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# docs/api is written by docs/build.py and not committed.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.parent != DOCS / "api"),
]


def blocks(page: Path, language: str) -> list[Example]:
    """Return the fenced blocks of a language. All blocks of a page share a namespace.

    `evaluate` runs a block of Python. Errors name the page and the line.
    """
    parser = CodeBlockParser(language, PythonEvaluator())
    return list(Sybil([parser], path=str(ROOT)).parse(page))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))
