"""The house rules that a machine can check: which way imports point, where tests are, how long things get."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tritium.train.config import TrainConfig
from tritium.train.distributed import Launch

pytestmark = pytest.mark.plain

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "train", "bench")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.startswith("test_")  # bench/test_kernels.py: cases for pytest-benchmark
)
# What each folder may import besides itself; "" is the root package, which holds the version.
BELOW = {"kernels": set(), "model": {"kernels"}, "train": {"kernels", "model", ""}, "bench": {"kernels", "model", "train", ""}}
MAX_LINES = {"file": 400, "function": 60, "kernel": 100}


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Modules of tritium that a source imports, as paths under the root: "kernels._op", "" for the root itself."""
    package = list(path.parts[:-1])
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in (*FOLDERS, "tritium") for alias in node.names), (
                f"{path}: import relatively"
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            assert node.module.split(".")[0] not in (*FOLDERS, "tritium"), f"{path}: import {node.module} relatively"
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
        inside = {".".join([*base, alias.name]) for alias in node.names} if not node.module and base else {".".join(base)}
        found |= inside
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_downward(path):
    folder = path.parts[0]
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert top == folder or top in BELOW[folder], f"{path} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "kernels" and path.stem != "__init__"], ids=str)
def test_kernel_files_ignore_one_another(path):
    for module in imported_modules(path):
        assert module.split(".")[-1].startswith("_"), f"{path} imports {module}: share through a _ file"


def test_every_source_has_its_test_file():
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    for path in SOURCES:
        names = [f"test_{path.stem}.py"]
        # The part of a kernel that stands in a file of its own, _OP_PART.py, is tested as part of the operator.
        names += [f"test_{other.stem}.py" for other in SOURCES if path.stem.startswith(f"_{other.stem}_")]
        if path.parent == Path("bench/kernels"):
            names = ["../test_case.py"]  # rows of data, tested as rows
        assert path.stem == "__init__" or any(Path(os.path.normpath(path.parent / name)) in tests for name in names), (
            f"{path} has no test file"
        )
    assert Path("test___main__.py") in tests


@pytest.mark.parametrize("path", [*SOURCES, Path("__init__.py"), Path("__main__.py")], ids=str)
def test_sizes(path):
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES["file"], f"{path}: {lines} lines"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef):
            continue
        limit = MAX_LINES["kernel" if node.name.endswith("_kernel") else "function"]
        assert node.end_lineno - node.lineno < limit, f"{path}: {node.name} is longer than {limit} lines"
        if node.name.endswith("_kernel"):
            flags = [arg.arg for arg in node.args.args if arg.arg.startswith(("IS_", "HAS_"))]
            assert len(flags) <= 3, f"{path}: {node.name} has flags {flags}; a second kernel would be clearer"


def test_the_loop_stays_short():
    assert (ROOT / "train" / "loop.py").read_text().count("\n") < 200


def test_only_these_read_the_environment_or_ask_for_the_device():
    environment, device = set(), set()
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        if re.search(r"os\.environ|os\.getenv", text):
            environment.add(str(path))
        if re.search(r"\.is_cuda|is_cpu\b", text):
            device.add(str(path))
    # train/data.py finds the cache folder, and nothing else, in the environment.
    assert environment == {"train/data.py", "train/distributed.py"}
    assert not device, "the dispatcher chooses by device, in kernels/_op.py"


def test_the_options_of_train_are_these():
    """A new option is a decision: it changes this list."""
    assert {field.name for field in fields(TrainConfig)} == {
        *("data", "tokenizer", "held_out", "out", "device", "precision", "compile", "attention", "recompute", "seed"),
        *("n_layer", "n_head", "d_model", "n_kv_head", "bias", "position", "norm", "mlp", "context_tokens", "document_mask"),
        *("steps", "batch_size", "micro_batch_size", "lr", "min_lr", "warmup_steps", "schedule", "optimizer", "weight_decay"),
        *("beta1", "beta2", "grad_clip"),
        *("eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints", "prompt", "sample_tokens"),
        *("profile", "wandb", "tensorboard"),
    }


def test_the_options_of_a_launch_are_these():
    assert {field.name for field in fields(Launch)} == {"parallel", "shard_ranks", "tensor_parallel"}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_refuse_to_be_imported_without_their_parent(folder):
    done = run_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}")
    assert done.returncode == 1
    assert f"write 'import tritium.{folder}', not 'import {folder}'" in done.stderr


def test_kernels_need_torch_and_triton_only():
    """And import without touching a device."""
    code = (
        "import sys, tritium.kernels, torch; "
        "assert not torch.cuda.is_initialized(); "
        "print(sorted({'rich', 'tyro', 'tiktoken', 'rustbpe', 'safetensors', 'matplotlib'} & set(sys.modules)))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


HIDE_TRITON = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("hidden")
sys.meta_path.insert(0, Hide())
"""


def test_everything_but_kernels_works_without_triton():
    code = HIDE_TRITON + (
        "import torch, tritium.train.commands\n"
        "from tritium.model import GPT, GPTConfig\n"
        "from tritium.kernels._triton import HAS_TRITON\n"
        "from tritium.kernels._layer_norm_launch import plan\n"
        "assert not HAS_TRITON and plan(4, 768).block_n == 1024\n"
        "model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=20, context_tokens=8))\n"
        "tokens = torch.randint(20, (2, 8)); model(tokens, tokens).backward()\n"
        "print(model.ln_f.weight.grad.isfinite().all().item())\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
