"""House rules that a machine can check: import direction, private files, test files, sizes."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]
# Lowest first: a folder imports only itself and the folders before it. All import errors.py.
FOLDERS = ("kernels", "model", "train", "bench")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.startswith("test_")  # bench/test_kernels.py: cases for pytest-benchmark
)
OPERATORS = [
    path
    for path in SOURCES
    if path.parts[0] == "kernels" and re.search(r"= define_op\(", (ROOT / path).read_text())
]
MAX_LINES = {"file": 400, "function": 60, "kernel": 100}


def sources_in(folder: str) -> list[Path]:
    """Return the sources of a folder. "": the sources in the root."""
    if not folder:
        return [Path("__init__.py"), Path("__main__.py")]
    return [path for path in SOURCES if path.parts[0] == folder]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def is_source(dotted: str) -> bool:
    return (ROOT / dotted.replace(".", "/")).with_suffix(".py").is_file() or (
        ROOT / dotted.replace(".", "/") / "__init__.py"
    ).is_file()


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Modules of tritium that a source imports: "kernels.core.op", "errors", "" for the version."""
    package = list(path.parts[:-1])
    found = set()
    for node in ast.walk(parse(path)):
        names = [each.name for each in getattr(node, "names", []) if isinstance(each, ast.alias)]
        if isinstance(node, ast.Import):
            roots = {name.split(".")[0] for name in names}
            assert not roots & {*FOLDERS, "tritium"}, f"{path}: import relatively"
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            root = node.module.split(".")[0]
            assert root not in (*FOLDERS, "tritium"), f"{path}: import {node.module} relatively"
            continue
        base = package[: len(package) - (node.level - 1)]
        base += node.module.split(".") if node.module else []
        inside = [".".join([*base, name]) for name in names]
        found |= {name if is_source(name) else ".".join(base) for name in inside}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_downward(folder):
    for path in sources_in(folder):
        allowed = {*FOLDERS[: FOLDERS.index(path.parts[0]) + 1], "errors"}
        if path.parts[0] in ("train", "bench"):
            allowed.add("")  # the version
        for module in imported_modules(path):
            assert module.split(".")[0] in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_private_files_are_imported_in_their_folder_only(folder):
    for path in sources_in(folder):
        for module in imported_modules(path):
            *folder, name = module.split(".")
            assert not name.startswith("_") or tuple(folder) == path.parts[:-1], f"{path}: {module}"


@pytest.mark.parametrize("path", OPERATORS, ids=str)
def test_operators_do_not_import_each_other(path):
    others = {".".join(other.with_suffix("").parts) for other in OPERATORS}
    own_folder = ".".join(path.parts[:-1])
    for module in imported_modules(path):
        assert module not in others, f"{path} imports {module}"
        assert module.startswith("kernels.core") or own_folder in module, f"{path}: {module}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_public_source_has_a_test_file(folder):
    """Files starting with _ are tested through the files that use them."""
    for path in sources_in(folder):
        if path.stem.startswith("_") or path.parts[:2] == ("bench", "ops"):
            continue
        file = ROOT / "tests" / path.with_name(f"test_{path.stem}.py")
        assert file.is_file(), f"{path} has no test file"


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_sizes(folder):
    for path in sources_in(folder):
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        assert lines <= MAX_LINES["file"], f"{path}: {lines} lines"
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            limit = MAX_LINES["kernel" if node.name.endswith("_kernel") else "function"]
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{path}: {node.name} has {length} lines, more than {limit}"
            if node.name.endswith("_kernel"):
                flags = [arg.arg for arg in node.args.args if arg.arg.startswith(("IS_", "HAS_"))]
                assert len(flags) <= 3, (
                    f"{path}: {node.name} has flags {flags}; write a second kernel"
                )


def test_only_define_op_chooses_by_device():
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"\.is_cuda|is_cpu\b", text), f"{path}: the dispatcher chooses"


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_outside_its_package_is_reported_as_not_installed(folder):
    done = run_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {folder} import GPT")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
    assert f"write 'import tritium.{folder}', not 'import {folder}'" in done.stderr


def test_kernels_import_only_torch_and_triton():
    """And import without touching a device."""
    code = (
        "import sys, tritium.kernels, torch; "
        "assert not torch.cuda.is_initialized(); "
        "heavy = {'rich', 'tyro', 'tiktoken', 'rustbpe', 'safetensors', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# If sys.modules has None for a name, Python behaves as if that package were not installed.
HIDE_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_everything_but_kernels_works_without_triton():
    code = HIDE_TRITON + (
        "import torch, tritium.train.commands.training.train\n"
        "from tritium.model import GPT, GPTConfig\n"
        "from tritium.kernels.core.triton import HAS_TRITON\n"
        "from tritium.kernels.norm.launch import plan\n"
        "assert not HAS_TRITON and plan(4, 768).block_n == 1024\n"
        "model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8))\n"
        "tokens = torch.randint(20, (2, 8)); model(tokens, tokens).backward()\n"
        "print(model.ln_f.weight.grad.isfinite().all().item())\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


# Words with a plainer synonym in the glossary: MLP, implementation, baseline, check, golden table.
WORDS = (
    *("perceptron", "contestant", "dearer", "anew", "refus(e|ed|es|al)", "held table", "of none"),
    *("that is none", "tokens a second", "steps a second", "ms a step", "bytes a token"),
)


def test_the_words_of_the_glossary_are_used():
    pattern = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)
    folders = [ROOT / name for name in (*FOLDERS, "tests", "docs")]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    for path in files:
        if path.suffix not in (".py", ".md", ".sh") or path == Path(__file__):
            continue
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"
