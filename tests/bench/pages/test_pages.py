import pytest

from tritium.bench.pages import pages as module
from tritium.bench.pages._docstring import to_markdown
from tritium.bench.pages._tables import table
from tritium.bench.pages.pages import main, page_of, pages, render
from tritium.errors import InputError
from tritium.kernels import __all__ as public_names

pytestmark = pytest.mark.plain

FILES = pages()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_committed_page_says_what_the_code_and_the_json_files_say(path):
    """After a change: `tritium bench pages`."""
    text = path.read_text(encoding="utf-8")
    assert render(text) == text


def test_each_public_operator_has_a_page():
    assert set(page_of()) == set(public_names)


def test_the_command_writes_the_generated_parts_only(tmp_path, monkeypatch):
    begin, end = "<!-- generated: signature rotary -->", "<!-- end -->"
    page = tmp_path / "rotary.md"
    page.write_text(f"# Rotary\n\n{begin}\nstale\n{end}\n\nThe end.\n")
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "public_names", ["rotary"])
    assert main([]) == 0
    text = page.read_text()
    assert text.startswith(f"# Rotary\n\n{begin}\n\n```text\nrotary(x: Tensor, ")
    assert text.endswith(f"```\n\n{end}\n\nThe end.\n")
    assert "stale" not in text

    monkeypatch.setattr(module, "public_names", ["rotary", "linear"])
    with pytest.raises(InputError, match="expected a page with the signature of linear"):
        main([])


def test_an_unknown_section_raises():
    with pytest.raises(InputError, match="unknown section 'costs'; did you mean 'cost'"):
        render("<!-- generated: costs rotary -->\n<!-- end -->")


def test_a_docstring_becomes_math_labels_and_tables():
    text = to_markdown(
        """A norm.

    forward    y = x * r

Shapes     x: (M, N)   r: (M,)
Long name  text of a * b, see _kernels.py and p_j,
           and arXiv:1910.07467
             N    bytes
             1    2

Free text with `code`."""
    )
    assert text == (
        "A norm.\n\n```text\nforward    y = x * r\n```\n\n"
        "**Shapes**\n\n```text\nx: (M, N)   r: (M,)\n```\n\n"
        "**Long name**: text of a \\* b, see `_kernels.py` and p_j, and "
        "[arXiv:1910.07467](https://arxiv.org/abs/1910.07467)\n\n"
        "```text\nN    bytes\n1    2\n```\n\nFree text with `code`."
    )


def test_a_table_aligns_numbers_to_the_right():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|--:|\n| x | 1 |"
