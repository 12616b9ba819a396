"""Packaging: the repository root is the package `tritium`."""

from setuptools import setup

setup(
    name="tritium",
    version="0.1.0",
    description="A GPT trainer built around Triton kernels",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=["tritium", "tritium.kernels", "tritium.model", "tritium.train", "tritium.bench"],
    package_dir={"tritium": "."},
    entry_points={"console_scripts": ["tritium = tritium.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "tiktoken",
        "rustbpe",
        "safetensors",
        "rich",
        "tyro",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "transformers", "pyarrow", "ruff"],
        "hf": ["transformers", "datasets"],
        "log": ["tensorboard", "wandb"],
    },
)
