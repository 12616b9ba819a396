"""tritium: a GPT trainer built around Triton kernels.

Three layers, each importing only what lies below it: `tritium.kernels` (fused operators, usable alone, needing torch and
triton only), `tritium.model` (GPT-2-family models as data plus thin modules), `tritium.train` (data, loop, checkpoints).
"""

__version__ = "0.1.0"
