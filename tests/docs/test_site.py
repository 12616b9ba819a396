"""The navigation and the links of the documentation. The strict build checks its anchors."""

import importlib
import re
from types import ModuleType

import pytest

from tritium import kernels

from .pages import DOCS, PAGES, ROOT, name

pytestmark = pytest.mark.plain

LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page, and of a file that it includes."""
    for file in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        text += (ROOT / file).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """The program docs/build.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        return importlib.import_module("build")


@pytest.fixture(scope="module")
def api(build) -> dict[str, str]:
    """The pages that docs/build.py writes from docstrings."""
    return build.pages()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page, api):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_api = target.parent == DOCS / "api"
        assert is_api or target.exists(), f"{link}: no such file"
        if DOCS in page.parents:
            assert DOCS in target.parents, f"{link}: the site has no files outside docs/"
        if anchor:
            linked = api[target.name] if is_api else target.read_text(encoding="utf-8")
            assert anchor in anchors(linked), f"{link}: no such heading"


def test_contributing_has_no_relative_links():
    """It is a page of the site too, in another folder."""
    links = LINK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert all(link.startswith(("https://", "#")) for link in links)


def test_the_navigation_has_every_page(api):
    nav = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert sorted(nav) == sorted([*pages, *(f"api/{file}" for file in api)])


def test_every_public_operator_is_described(api):
    sections = set(re.findall(r"^## (\w+)$", api["kernels.md"], re.MULTILINE))
    assert sections == set(kernels.__all__)
    assert "- `window`: how many keys a query sees" in api["kernels.md"]
    assert "| `lr` | `" in api["options.md"]


def test_docstrings_become_markdown(api):
    text = "".join(api.values())
    assert not re.search(r"^(Args|Returns|Raises):", text, re.MULTILINE)
    assert "Run.model: GPT" in api["tritium.md"]
    assert "GPT.generate(\n    prompts: " in api["model.md"]
