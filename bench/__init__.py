"""Measurements: kernels, their machine code and training speed, compared with other programs."""

from pathlib import Path

if "." not in __name__:
    raise ModuleNotFoundError(
        "this folder is part of the package 'tritium': "
        "write 'import tritium.bench', not 'import bench'",
        name=__name__,
    )

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the package."""
RESULTS = ROOT / "bench" / "results"
"""The folder of the records that are committed."""
