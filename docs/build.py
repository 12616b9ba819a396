"""Build the documentation: python docs/build.py

It writes the generated parts of the pages, as `tritium bench pages` does. It writes a page per
public module to docs/api/, from signatures and docstrings. Then it calls Zensical, which writes
site/. A warning of Zensical, such as a broken link, is an error. A font, script, style or picture
of another host is an error too.
"""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from tritium.bench.pages.pages import write_pages

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
API = DOCS / "api"
SITE = ROOT / "site"
# A signature that is longer has a line per parameter.
LINE = 88


def main() -> int:
    """Write generated parts and docs/api/, and build the site. Returns: the exit status."""
    write_pages()
    API.mkdir(exist_ok=True)
    for name, text in pages().items():
        (API / name).write_text(text, encoding="utf-8")
    # A cached page would not show a changed file that it includes. --clean would delete all folders
    # in .cache, also those of other programs. Zensical's own files are directly in it.
    for cached in (ROOT / ".cache").glob("*"):
        if cached.is_file():
            cached.unlink()
    shutil.rmtree(SITE, ignore_errors=True)  # it may have pages that no longer exist
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    found = foreign_files(SITE)
    for line in found:
        print(f"docs/build.py: expected files of the site only, got {line}", file=sys.stderr)
    return status or bool(found)


def foreign_files(site: Path) -> list[str]:
    """Return the places where a page loads a file from another host."""
    tag = r"<(?:script|link|img|iframe|source)\b"
    loads = re.compile(tag + r"[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*")
    return [
        f"{page.relative_to(site)}: {load}"
        for page in sorted(site.rglob("*.html"))
        for load in loads.findall(page.read_text(encoding="utf-8"))
    ]


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    import tritium
    from tritium import kernels, model
    from tritium.kernels import modules
    from tritium.kernels.integrations import compat, transformers
    from tritium.train import api, config

    public = [getattr(tritium, name) for name in tritium.__all__]
    models = [getattr(model, name) for name in model.__all__ if name != "PRESETS"]
    options = [config.TrainConfig, config.ExecutionOptions, config.ReportOptions]
    return {
        # tritium.train is a module that can be called. Its documentation is the function's.
        "tritium.md": page("tritium", api, [api.train, *public[1:]]),
        "kernels.md": page(
            "tritium.kernels", kernels, [getattr(kernels, name) for name in kernels.__all__]
        ),
        "modules.md": page("tritium.kernels.modules", modules, defined_in(modules)),
        "transformers.md": page(
            "tritium.kernels.integrations.transformers", transformers, defined_in(transformers)
        ),
        "compat.md": page("tritium.kernels.integrations.compat", compat, named_in(compat)),
        "model.md": page("tritium.model", model, models),
        "options.md": page("Options of training", config, options),
    }


def defined_in(module: ModuleType) -> list:
    """Return the public functions and classes of a module, in the order of its file."""
    return [each for each in named_in(module) if each.__module__ == module.__name__]


def named_in(module: ModuleType) -> list:
    """Return the documented functions and classes of this package that a module has."""
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    found = [getattr(module, name) for name in names]
    return [
        each
        for each in found
        if (inspect.isfunction(each) or inspect.isclass(each))
        and each.__module__.startswith("tritium.")
        and not is_dataclass(each)
        and each.__doc__
    ]


def page(title: str, module: ModuleType, members: Iterable) -> str:
    """Return a page: the docstring of a module, and a section per member."""
    parts = [f"# {title}", *render(inspect.getdoc(module) or "")]
    for member in members:
        parts += section(member, "##")
    return "\n\n".join(parts) + "\n"


def section(member, level: str, owner: str = "") -> list[str]:
    """Return the paragraphs on a function, a class, a method or a property."""
    name = function_of(member).__name__
    parts = [f"{level} {name}", f"```python\n{signature(member, owner + name)}\n```"]
    parts += render(documentation(member))
    if inspect.isclass(member):
        if is_dataclass(member) and (table := table_of_fields(member)):
            parts.append(table)
        for each in methods(member):
            parts += section(each, level + "#", f"{name}.")
    return parts


def documentation(member) -> str:
    """Return an object's own docstring. Those of torch.nn.Module and of errors are not ours."""
    return inspect.cleandoc(member.__doc__ or "")


def function_of(member):
    """Return the function of a property, and any other member itself."""
    if isinstance(member, cached_property):
        return member.func
    return member.fget if isinstance(member, property) else member


def methods(cls: type) -> Iterator:
    """Yield the public methods that a class defines and documents, properties included."""
    for name, each in vars(cls).items():
        if isinstance(each, classmethod | staticmethod):
            each = each.__func__
        is_method = inspect.isfunction(each) or isinstance(each, property | cached_property)
        if name[0] != "_" and is_method and each.__doc__:
            yield each


def signature(member, name: str) -> str:
    """Return how a function is called, with a line per parameter if one line is too long."""
    if inspect.isclass(member) and (is_dataclass(member) or issubclass(member, Exception)):
        return f"class {name}"
    found = inspect.signature(function_of(member))
    parameters = list(found.parameters.values())
    if "." in name:  # a method: without its object
        parameters = parameters[1:]
    words = []
    for each in parameters:
        star = "*" if each.kind is each.KEYWORD_ONLY else ""
        if star and not any(word.startswith("*") for word in words):
            words.append("*")
        words.append(parameter(each))
    returns = ""
    if found.return_annotation is not found.empty:
        returns = " -> " + type_name(found.return_annotation)
    if function_of(member) is not member:
        return f"{name}{returns.replace(' ->', ':')}"
    line = f"{name}({', '.join(words)}){returns}"
    if len(line) <= LINE:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"


def parameter(each: inspect.Parameter) -> str:
    """Return a parameter as in a signature, with short names of types."""
    star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
    annotation = "" if each.annotation is each.empty else f": {type_name(each.annotation)}"
    space = " " if annotation else ""
    default = "" if each.default is each.empty else f"{space}={space}{each.default!r}"
    return f"{star}{each.name}{annotation}{default}"


def type_name(annotation) -> str:
    """Return a type without its modules: Tensor for torch.Tensor."""
    text = inspect.formatannotation(annotation).replace("'", "")
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+([A-Z]\w*)", r"\1", text)


def table_of_fields(cls: type) -> str:
    """Return the fields of a dataclass with their types, defaults and docstrings."""
    texts = field_docstrings(cls)
    rows = []
    for field in fields(cls):
        if field.name not in texts:
            continue
        default = "" if field.default.__class__.__name__ == "_MISSING_TYPE" else repr(field.default)
        cells = [f"`{field.name}`", f"`{default}`" if default else "", escape(texts[field.name])]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if not rows:
        return ""
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the string below each field, which Python itself does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


# --- docstrings


@dataclass
class Entry:
    """A section of a docstring, such as Returns, or an argument in it."""

    name: str
    lines: list[str]


def render(text: str) -> list[str]:
    """Return a docstring as paragraphs of Markdown: its text, then its sections as lists."""
    description, sections = split(text)
    parts = [block(each) for each in paragraphs(description)]
    for each in sections:
        entries = arguments(each.lines) if each.name in ("Args", "Attributes") else []
        if entries:
            items = [f"- `{entry.name}`: {join(entry.lines)}" for entry in entries]
            parts.append(f"**{each.name}**\n\n" + "\n".join(items))
        else:
            parts.append(f"**{each.name}**: {join(each.lines)}")
    return parts


def split(text: str) -> tuple[str, list[Entry]]:
    """Split a docstring into its description and its sections."""
    description, sections = [], []
    for line in text.splitlines():
        heading = re.match(r"(Args|Attributes|Returns|Raises|Yields): *(.*)$", line)
        if heading:
            sections.append(Entry(heading[1], [heading[2]] if heading[2] else []))
        elif sections and (line.startswith(" ") or not line):
            sections[-1].lines.append(line)
        else:
            description.append(line)
    return "\n".join(description), sections


def paragraphs(text: str) -> list[str]:
    """Split a text at its empty lines. Indented paragraphs that follow each other stay together."""
    found: list[str] = []
    for each in re.split(r"\n\s*\n(?=.)", text.strip("\n")):
        if found and is_indented(found[-1]) and is_indented(each):
            found[-1] += "\n\n" + each
        elif each.strip():
            found.append(each)
    return found


def is_indented(text: str) -> bool:
    """Return whether each line is indented: such a paragraph is code or a table of words."""
    return all(line.startswith("    ") or not line for line in text.splitlines())


def arguments(lines: list[str]) -> list[Entry]:
    """Return the arguments that a section lists: `name: text`, continued on indented lines."""
    lines = textwrap.dedent("\n".join(lines)).splitlines()
    entries: list[Entry] = []
    for line in lines:
        start = re.match(r"(other arguments|\w+(?:, \w+)*): +(.*)$", line)
        if start:
            entries.append(Entry(start[1], [start[2]]))
        elif entries:
            entries[-1].lines.append(line)
        else:
            return []
    return entries


def join(lines: list[str]) -> str:
    """Return lines as one, safe in Markdown."""
    return escape(" ".join(" ".join(lines).split()))


def block(text: str) -> str:
    """Return a paragraph, safe in Markdown. Code and tables of words become a block of text."""
    is_table = re.match(r"\w+ {3,}", text)
    if is_table or is_indented(text):
        return f"```text\n{textwrap.dedent(text)}\n```"
    return escape(text)


def escape(text: str) -> str:
    """Make the characters that Markdown would interpret stand for themselves, except in `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_>\[\]])", r"\\\1", part.replace("<", "&lt;"))
        for part in parts
    )


if __name__ == "__main__":
    sys.exit(main())
